"""The keys and values of one sequence as the attention kernels want them, all layers in one piece of memory.

Knows nothing of models. Memory is reserved but not touched before it is written. Invariant: every layer holds the
first `length` tokens; what lies behind them is never used, so that a pass which fails half way changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS, KVLayout
from cpu_kernels.kv_policy import HELD_WINDOW_BLOCKS, KVPolicy
from cpu_kernels.memory import ALIGNMENT
from offload.memory import release_pages, reserved_bytes
from runtime.executor.program.kv_rows import export_block, import_block
from runtime.executor.saved_rows import RowsLayout


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLayout:
    """Where layers lie in a sequence's memory, and in that of its windows; one object for each that there is."""

    layers: tuple[KVLayout, ...]
    starts: tuple[int, ...]  # of every layer's keys, which its values follow; then the end of all
    window_starts: tuple[int, ...]

    @property
    def capacity_tokens(self) -> int:
        """Tokens that memory is reserved for."""
        return self.layers[0].capacity_tokens


@cache
def sequence_layout(
    policy: KVPolicy, layers: int, kv_heads: int, key_length: int, value_length: int, capacity_tokens: int
) -> SequenceLayout:
    """That of sequences whose layers are kept by a policy."""
    layouts = policy.layouts(layers, kv_heads, key_length, value_length, capacity_tokens)
    assert all(layout.key_bytes % ALIGNMENT == 0 for layout in layouts), "blocks of 64 tokens are whole cache lines"
    starts = accumulate((layout.key_bytes + layout.value_bytes for layout in layouts), initial=0)
    return SequenceLayout(
        layouts, tuple(starts), tuple(accumulate((layout.window_bytes for layout in layouts), initial=0))
    )


class ProgramKV:
    """Keys and values of up to `capacity_tokens` tokens in `layers` layers, in the types that `policy` says.

    Memory is reserved for a power of two of blocks, so that few programs serve sequences of every capacity, and in
    small pages, so that what is never written takes no RAM. Huge ones made decode at 3900 tokens of a 1B model no
    faster (29.4 ms a token against 29.2, one Zen 5 core).

    Types that wait for a full block have a window beside it, in which the newest keys lie in float16. The window of the
    last two blocks is kept between steps; where it is gone, `truncate` takes whole blocks alone (`cut_at`).
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        key_length: int,
        value_length: int,
        capacity_tokens: int,
        policy: KVPolicy | None = None,
    ) -> None:
        """ValueError for a capacity below 1."""
        if capacity_tokens < 1:
            raise ValueError(f"a KV cache of {capacity_tokens} tokens")
        self.capacity_tokens = capacity_tokens
        self.length = 0
        blocks = -(-capacity_tokens // BLOCK_TOKENS)
        reserved_tokens = BLOCK_TOKENS << (blocks - 1).bit_length()
        self.policy = policy or KVPolicy()
        self.layout = sequence_layout(self.policy, layers, kv_heads, key_length, value_length, reserved_tokens)
        self._memory = reserved_bytes(self.layout.starts[-1], huge_pages=False)
        self._window = reserved_bytes(self.layout.window_starts[-1], huge_pages=False)
        self._window_from = 0  # the first block whose window is still there

    @property
    def address(self) -> int:
        """Of the first layer's keys; its values follow, then the next layer."""
        return int(self._memory.ctypes.data)

    @property
    def window_address(self) -> int:
        """Of the first window."""
        return int(self._window.ctypes.data)

    @property
    def num_bytes(self) -> int:
        """Bytes of `capacity_tokens` tokens, between two steps."""
        windows = self.layout.window_starts[-1] // (self.layout.layers[0].pieces * PIECE_BLOCKS) * HELD_WINDOW_BLOCKS
        return sum(layout.token_bytes for layout in self.layout.layers) * self.capacity_tokens + windows

    @property
    def has_window(self) -> bool:
        """Whether the newest keys of some layer lie in a window."""
        return self.layout.window_starts[-1] > 0

    def cut_at(self, length: int) -> int:
        """See `WindowedKV`."""
        if not self.has_window or length // BLOCK_TOKENS >= self._window_from:
            return length
        return length // BLOCK_TOKENS * BLOCK_TOKENS

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on; ValueError below 0, above `self.length`, or not where it can be cut."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncating a KV cache of {self.length} tokens to {length}")
        if self.cut_at(length) != length:
            raise ValueError(f"keys before token {length} are no longer as they were; cut at {self.cut_at(length)}")
        self.length = length
        self._window_from = min(self._window_from, length // BLOCK_TOKENS)

    def grow(self, length: int) -> None:
        """The first `length` tokens are held from now on: a pass has put them there."""
        self.length = length
        held = max(length // BLOCK_TOKENS + 1 - HELD_WINDOW_BLOCKS, 0)
        if self.has_window and held > self._window_from:
            self._release(self._window_from, held)
            self._window_from = held

    def _release(self, first: int, last: int) -> None:
        """Gives back the windows of blocks before `last`, from the piece of block `first` on."""
        for layout, start, end in zip(
            self.layout.layers, self.layout.window_starts, self.layout.window_starts[1:], strict=False
        ):
            if not layout.has_window:
                continue
            runs = self._window[start:end].reshape(layout.pieces, layout.kv_heads, PIECE_BLOCKS, -1)
            for piece in range(first // PIECE_BLOCKS, (last - 1) // PIECE_BLOCKS + 1):
                for run in runs[piece]:
                    release_pages(run[: last - piece * PIECE_BLOCKS])

    @property
    def rows_layout(self) -> RowsLayout:
        """See `SavedRows`: layer after layer keys, then values, as they lie here."""
        layers = self.layout.layers
        turned = any(layer.rotates_keys or layer.rotates_values for layer in layers)
        types = "f16" if self.policy.is_plain else f"{self.policy.name}{', turned' if turned else ''}"
        name = (
            f"{types}, {len(layers)} layers of {layers[0].kv_heads} heads, keys of {layers[0].key_length}, "
            f"values of {layers[0].value_length}, in blocks of {BLOCK_TOKENS}"
        )
        return RowsLayout(name, BLOCK_TOKENS, self.layout.starts[-1] // (layers[0].pieces * PIECE_BLOCKS))

    @property
    def final_tokens(self) -> int:
        """See `SavedRows`."""
        return self.length // BLOCK_TOKENS * BLOCK_TOKENS if self.has_window else self.length

    def export_block(self, index: int, out: NDArray[np.uint8]) -> None:
        """See `SavedRows`."""
        export_block(self._parts(), index, out)

    def import_block(self, index: int, data: NDArray[np.uint8]) -> None:
        """See `SavedRows`."""
        import_block(self._parts(), index, data)

    def restored(self, length: int) -> None:
        """See `SavedRows`; ValueError above the capacity."""
        if length > self.capacity_tokens:
            raise ValueError(f"{length} tokens in a KV cache of {self.capacity_tokens}")
        if length > self.length:  # their window was not brought
            self._window_from = length // BLOCK_TOKENS
        self.length = length

    def _parts(self) -> Iterator[NDArray[np.uint8]]:
        """Keys, then values of every layer: (pieces, heads, blocks of a piece, bytes of a block) each."""
        for layout, start in zip(self.layout.layers, self.layout.starts, strict=False):
            middle = start + layout.key_bytes
            for part in (self._memory[start:middle], self._memory[middle : middle + layout.value_bytes]):
                yield part.reshape(layout.pieces, layout.kv_heads, PIECE_BLOCKS, -1)
