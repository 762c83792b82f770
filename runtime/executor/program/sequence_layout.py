"""How the layers of a sequence's KV cache are laid out, one object for each layout that there is: programs go by it.

Knows nothing about where a sequence's memory lies.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from cpu_kernels.kv_layout import KVLayout
from cpu_kernels.kv_policy import KVPolicy
from runtime.executor.program.kv_abstracts import AbstractsLayout

ADDRESS_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLayout:
    """How layers are laid out, and where each lies in the memory of windows; one object for each that there is."""

    layers: tuple[KVLayout, ...]
    window_starts: tuple[int, ...]
    abstracts: AbstractsLayout | None = None  # where layers may be read in part
    budget_tokens: int = 0  # that are then read of a KV head; 0: all

    def table_start(self, layer: int) -> int:
        """Where a layer's table of chunks begins in that of the sequence, (layers, pieces): in bytes."""
        return layer * self.layers[0].pieces * ADDRESS_BYTES

    @property
    def piece_bytes(self) -> int:
        """Bytes of a piece's chunks in all layers."""
        return sum(layout.chunk_bytes for layout in self.layers)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that tables and windows are for."""
        return self.layers[0].capacity_tokens


@cache
def sequence_layout(
    policy: KVPolicy, layers: int, kv_heads: int, key_length: int, value_length: int, capacity_tokens: int
) -> SequenceLayout:
    """That of sequences whose layers are kept by a policy."""
    layouts = policy.layouts(layers, kv_heads, key_length, value_length, capacity_tokens)
    windows = tuple(accumulate((layout.window_bytes for layout in layouts), initial=0))
    chosen = [policy.is_chosen_from(layer) for layer in range(layers)]
    return SequenceLayout(layouts, windows, AbstractsLayout.of(layouts, chosen) if any(chosen) else None)


@cache
def choosing_layout(layout: SequenceLayout, budget_tokens: int | None) -> SequenceLayout:
    """The same cache for passes that read so many tokens of it at most."""
    if budget_tokens is None or layout.abstracts is None:
        return layout
    return replace(layout, budget_tokens=budget_tokens)
