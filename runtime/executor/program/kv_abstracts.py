"""The abstracts of a sequence's keys in the layers that are not read whole, and what choosing by them has come to.

Knows nothing of models or of when tokens come. Memory is reserved but not touched before it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpu_kernels.kv_abstracts import BLOCK_LEAVES, FAN, IndexLayout
from cpu_kernels.kv_index import index_row
from cpu_kernels.kv_layout import BLOCK_TOKENS, KVLayout, KVMemory
from cpu_kernels.kv_select import COUNTS
from cpu_kernels.pool import Pool
from cpu_kernels.program import Program
from offload.memory import reserved_bytes


@dataclass(frozen=True, slots=True)
class ChoiceCounts:
    """What was chosen so far, over all layers, KV heads and tokens: bounds that were evaluated for how many leaves, and
    blocks that were read of those there were.
    """

    bounds: int
    leaves: int
    read_blocks: int
    blocks: int


@dataclass(frozen=True, slots=True)
class AbstractsLayout:
    """Where layers' abstracts and counters lie in a sequence's memory of them; None for layers that are read whole."""

    layers: tuple[IndexLayout | None, ...]

    @classmethod
    def of(cls, layouts: Sequence[KVLayout], chosen: Sequence[bool]) -> "AbstractsLayout":
        """For layers of a cache; `chosen`: those that are not read whole."""
        return cls(
            tuple(
                IndexLayout(layout.kv_heads, layout.key_length, layout.capacity_tokens) if is_chosen else None
                for layout, is_chosen in zip(layouts, chosen, strict=True)
            )
        )

    def start(self, layer: int) -> int:
        """Of a layer's abstracts, in bytes."""
        return sum(place.num_bytes for place in self.layers[:layer] if place is not None)

    def counts_start(self, layer: int) -> int:
        """Of a layer's counters, in bytes."""
        return 8 * COUNTS * sum(place.kv_heads for place in self.layers[:layer] if place is not None)

    @property
    def num_bytes(self) -> int:
        """Of all abstracts."""
        return self.start(len(self.layers))


class KVAbstracts:
    """Those of one sequence whose layers are laid out so."""

    def __init__(self, layout: AbstractsLayout) -> None:
        self.layout = layout
        self._memory = reserved_bytes(layout.num_bytes, huge_pages=False)
        self._counts = np.zeros((layout.counts_start(len(layout.layers)) // (8 * COUNTS), COUNTS), np.int64)

    @property
    def address(self) -> int:
        """Of the first layer's."""
        return int(self._memory.ctypes.data)

    @property
    def counts_address(self) -> int:
        """Of the first layer's counters."""
        return int(self._counts.ctypes.data)

    @property
    def counts(self) -> ChoiceCounts:
        """What was chosen so far."""
        return ChoiceCounts(*(int(total) for total in self._counts.sum(axis=0)))

    def rebuild(self, memories: Sequence[KVMemory], first_block: int, last_block: int) -> None:
        """From the keys of full blocks, in order; `memories`: of every layer, addresses."""
        rows = [
            index_row(
                memory,
                self.address + self.layout.start(layer),
                heads=place.kv_heads,
                tokens=(last_block - first_block) * BLOCK_TOKENS,
                start=first_block * BLOCK_TOKENS,
            )
            for layer, (place, memory) in enumerate(zip(self.layout.layers, memories, strict=True))
            if place is not None
        ]
        with Pool(1) as pool:
            pool.run(Program(rows))

    def take(self, other: "KVAbstracts", blocks: int) -> None:
        """Copies those of the first blocks of another of the same model."""
        for layer, (place, its) in enumerate(zip(self.layout.layers, other.layout.layers, strict=True)):
            if place is None or its is None:
                continue
            for head in range(place.kv_heads):
                to = self.layout.start(layer) + head * place.head_bytes
                source = other.layout.start(layer) + head * its.head_bytes
                nodes = blocks * BLOCK_LEAVES
                for mine, theirs in zip(place.groups, its.groups, strict=False):
                    size = -(-nodes // FAN) * place.group_bytes
                    self._memory[to : to + size] = other._memory[source : source + size]
                    to, source, nodes = to + mine * place.group_bytes, source + theirs * place.group_bytes, nodes // FAN
