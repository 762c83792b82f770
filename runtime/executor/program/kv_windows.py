"""The newest keys of layers whose types wait for a full block, in float16: where they lie, and until when.

Knows nothing about chunks. Invariant: the windows of the last `HELD_WINDOW_BLOCKS` blocks are kept between two steps.
"""

from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS
from cpu_kernels.kv_policy import HELD_WINDOW_BLOCKS
from offload.memory import release_pages, reserved_bytes
from runtime.executor.program.sequence_layout import SequenceLayout


class KVWindows:
    """Those of the layers of `layout` that have one."""

    def __init__(self, layout: SequenceLayout) -> None:
        self._layout = layout
        self._memory = reserved_bytes(layout.window_starts[-1], huge_pages=False)
        self._from = 0  # the first block whose window is still there

    @property
    def exist(self) -> bool:
        """Whether some layer has one."""
        return self._layout.window_starts[-1] > 0

    @property
    def address(self) -> int:
        """Of the first."""
        return int(self._memory.ctypes.data)

    @property
    def num_bytes(self) -> int:
        """That they take between two steps."""
        layout = self._layout
        return layout.window_starts[-1] // (layout.layers[0].pieces * PIECE_BLOCKS) * HELD_WINDOW_BLOCKS

    def cut_at(self, length: int) -> int:
        """The most tokens up to `length` from which on tokens can be put there anew: whole blocks where it is gone."""
        if not self.exist or length // BLOCK_TOKENS >= self._from:
            return length
        return length // BLOCK_TOKENS * BLOCK_TOKENS

    def cut(self, length: int) -> None:
        """Tokens from `length` on are forgotten."""
        self._from = min(self._from, length // BLOCK_TOKENS)

    def begin(self, length: int) -> None:
        """The first `length` tokens were brought without them."""
        self._from = length // BLOCK_TOKENS

    def grow(self, length: int) -> None:
        """There are `length` tokens: what is older than those to be kept is given back."""
        held = max(length // BLOCK_TOKENS + 1 - HELD_WINDOW_BLOCKS, 0)
        if self.exist and held > self._from:
            self._release(self._from, held)
            self._from = held

    def _release(self, first: int, last: int) -> None:
        """Gives back those of blocks before `last`, from the piece of block `first` on."""
        starts = self._layout.window_starts
        for layout, start, end in zip(self._layout.layers, starts, starts[1:], strict=False):
            if not layout.has_window:
                continue
            runs = self._memory[start:end].reshape(layout.pieces, layout.kv_heads, PIECE_BLOCKS, -1)
            for piece in range(first // PIECE_BLOCKS, (last - 1) // PIECE_BLOCKS + 1):
                for run in runs[piece]:
                    release_pages(run[: last - piece * PIECE_BLOCKS])
