"""Keys and values that the GPU of a hybrid plan does not hold: how RAM and flash share them, and what reading costs.

Layers of the CPU have all of theirs there, layers of the GPU the pieces that it may not hold. Those on flash are spread
evenly over the layers, as far as they have any. Knows nothing about how plans are found. Sizes are bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cpu_kernels.kv_layout import CHUNK_PAGE_BYTES, PIECE_TOKENS, pieces_of
from offload.kv_chunks import staging_slots
from planner.hybrid_memory import ram_kv_tokens
from planner.hybrid_split import Split
from planner.kv_spill import LEAST_PIECES, Spilling, flash_notes, lost_seconds
from planner.model_shape import ModelShape
from planner.prediction import Prediction


@dataclass(frozen=True, slots=True)
class HostKV:
    """Pieces of each layer that are not the GPU's; `chunk_bytes` of one, in any layer."""

    pieces: tuple[int, ...]
    chunk_bytes: int

    @classmethod
    def of(cls, shape: ModelShape, split: Split, context_tokens: int) -> "HostKV":
        """Those of a context of so many tokens."""
        every = pieces_of(context_tokens)
        moved = ram_kv_tokens(context_tokens, split.kv_tokens) // PIECE_TOKENS
        layers = range(len(shape.kv_bytes_per_layer))
        largest = max(shape.kv_bytes_per_layer, default=0) * PIECE_TOKENS
        pieces = tuple(moved if layer in split.attention else every for layer in layers)
        return cls(pieces, -(-largest // CHUNK_PAGE_BYTES) * CHUNK_PAGE_BYTES)

    @property
    def all_bytes(self) -> int:
        """RAM that holds all of them."""
        return self._ram_bytes(0)

    @property
    def least_bytes(self) -> int:
        """The least RAM that they can do with: a few pieces of each layer, and room for a new one."""
        most = max(self.pieces, default=0)
        at_least = min(self._ram_bytes(cold) for cold in range(most + 1)) + (1 + len(self.pieces)) * self.chunk_bytes
        return min(max(self._ram_bytes(max(most - LEAST_PIECES, 0)), at_least), self.all_bytes)

    def cold_bytes(self, ram_bytes: int) -> int:
        """Bytes on flash where RAM may hold so much of them, the room that they are read to included."""
        for cold in range(max(self.pieces, default=0) + 1):
            left = ram_bytes - self._ram_bytes(cold)
            if left >= 0:
                away, deepest = sum(min(cold, count) for count in self.pieces), sum(n >= cold for n in self.pieces)
                return (away - min(left // max(self.chunk_bytes, 1), deepest if cold else 0)) * self.chunk_bytes
        return sum(self.pieces) * self.chunk_bytes

    def _ram_bytes(self, cold: int) -> int:
        """RAM that is taken while so many pieces of each layer, as far as it has them, lie on flash."""
        held = sum(max(count - cold, 0) for count in self.pieces)
        return (held + staging_slots(len(self.pieces), self.chunk_bytes, cold)) * self.chunk_bytes


def host_lost_seconds(
    shape: ModelShape, split: Split, spilling: Spilling, depth: int, computing_s: float
) -> tuple[float, float]:
    """Seconds that reading adds to a step behind `depth` that computes for so long, and those that it takes alone."""
    cold = HostKV.of(shape, split, depth).cold_bytes(spilling.ram_bytes)
    return lost_seconds(spilling.rates, cold, 0, computing_s), cold / spilling.rates.bytes_per_s


def cold_byte_seconds(shape: ModelShape, spilling: Spilling, depth: int) -> float:
    """Seconds that a byte of the keys and values that the GPU does not hold costs for lying on flash in part.

    As if the CPU had all layers: for choosing a split.
    """
    host = HostKV.of(shape, Split(), max(depth, 1))
    return host.cold_bytes(spilling.ram_bytes) / max(host.all_bytes, 1) / spilling.rates.bytes_per_s


def host_notes(
    shape: ModelShape, split: Split, context_tokens: int, spilling: Spilling, full: Prediction
) -> Iterator[str]:
    """How a full context is spread where RAM does not hold what the GPU leaves of it; `full`: see `flash_notes`."""
    host = HostKV.of(shape, split, context_tokens)
    if cold := host.cold_bytes(spilling.ram_bytes):
        every = sum(host.pieces)
        kept = f"of what the GPU does not hold {every - cold // host.chunk_bytes} of {every}"
        yield from flash_notes(kept, cold, cold, full)
