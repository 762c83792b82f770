"""Layers of a sequence whose chunks go to flash together, and in which order groups of them do.

Without a budget that is all of them, so that what a pass reads is spread evenly over its layers. Where a token chooses
what it reads, little of those layers is read: they go first, one by one, and layers that are read whole stay in RAM
while there is room, as far as they see. Knows nothing about memory or files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpu_kernels.kv_layout import PIECE_BLOCKS, PIECE_TOKENS, KVLayout
from offload.pairs import Pairs

if TYPE_CHECKING:
    from runtime.executor.program.sequence_layout import SequenceLayout


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """`layers` go together. `window`: of the newest tokens that they see, None for all. `is_chosen`: tokens choose what
    they read of them.
    """

    layers: tuple[int, ...]
    window: int | None = None
    is_chosen: bool = False

    def is_spared(self, piece: int, tokens: int) -> bool:
        """Whether a piece of a sequence of so many tokens goes before what is read whole."""
        return self.is_chosen or piece < first_seen(self.window, tokens)


def first_seen(window: int | None, start: int) -> int:
    """The first piece that a token at position `start` sees."""
    return 0 if window is None else max(start - window + 1, 0) // PIECE_TOKENS


def layer_groups(layout: "SequenceLayout", windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Of a sequence laid out so, whose layers see so many tokens each; none given: all see all."""
    every = range(len(layout.layers))
    if layout.abstracts is None:
        return (LayerGroup(tuple(every)),)
    seen = windows or [None] * len(layout.layers)
    chosen = [place is not None and window is None for place, window in zip(layout.abstracts.layers, seen, strict=True)]
    whole = [layer for layer in every if not chosen[layer]]
    return (
        *(LayerGroup((layer,), is_chosen=True) for layer in every if chosen[layer]),
        *(
            LayerGroup(tuple(layer for layer in whole if seen[layer] == window), window)
            for window in dict.fromkeys(seen[layer] for layer in whole)
        ),
    )


def pairs_by_layer(layout: "SequenceLayout", groups: Sequence[LayerGroup]) -> dict[int, Pairs]:
    """By layer of which tokens choose what they read how chunks lie on flash."""
    chosen = [layer for group in groups if group.is_chosen for layer in group.layers]
    return {layer: pairs_of(layout.layers[layer]) for layer in chosen}


def pairs_of(layout: KVLayout) -> Pairs:
    """The keys and values of a chunk's blocks."""
    return Pairs(layout.kv_heads * PIECE_BLOCKS, layout.key_block_bytes, layout.value_block_bytes)


def in_order(
    groups: Sequence[LayerGroup], cold: Sequence[int], full: Sequence[int], tokens: int
) -> Iterator[tuple[int, LayerGroup]]:
    """Full pieces of a sequence of `tokens` tokens in the order in which they go to flash, and of which layers.

    `full`: how many each group has; `cold`: how many of them are on flash already.
    """
    left = list(cold)
    while waiting := [number for number in range(len(groups)) if left[number] < full[number]]:
        best = min(waiting, key=lambda number: (not groups[number].is_spared(left[number], tokens), left[number]))
        yield left[best], groups[best]
        left[best] += 1
