"""Reads of the blocks of KV chunks on flash that a layer's tokens have chosen, once they have.

What was chosen of a lane is read to one slot for each of its pieces on flash, which all lanes and layers share: a layer
is over before the next one chooses. Only pages that hold chosen blocks are read, and checked; a slot's other bytes are
anything. Knows nothing about how blocks are chosen.
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.ctypeslib import as_array
from numpy.typing import NDArray

from cpu_kernels.kv_layout import CHUNK_PAGE_BYTES, PIECE_BLOCKS, KVLayout
from cpu_kernels.kv_select import chosen_bytes
from offload.errors import FlashError, StrataError
from offload.kv_chunks import Chunk, ChunkStore
from offload.memory import reserved_bytes
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_tiers import lost
from runtime.executor.program.lanes import Lane

Bytes = NDArray[np.uint8]


class ChosenReads:
    """For passes over chunks of `store`, one at a time."""

    def __init__(self, store: ChunkStore, windows: Sequence[int | None]) -> None:
        self._store = store
        self._windows = tuple(windows)
        self._lanes: Sequence[Lane] = ()
        self._slots: list[Bytes] = []
        self.read_bytes = 0

    def takes(self, layer: int, lanes: Sequence[Lane]) -> bool:
        """Whether blocks of a layer are chosen by all lanes."""
        return self._windows[layer] is None and all(
            lane.layout.budget_tokens > 0
            and lane.layout.abstracts is not None
            and lane.layout.abstracts.layers[layer] is not None
            for lane in lanes
        )

    def begin(self, lanes: Sequence[Lane], layers: Sequence[int]) -> bool:
        """For a pass over these lanes that chooses in `layers`: tables tell where what is chosen will be.

        Whether anything of theirs is on flash.
        """
        self._lanes = lanes
        is_cold = False
        for kv in {lane.kv for lane in lanes}:
            for layer in layers:
                for number, (piece, chunk) in enumerate(_cold(kv, layer)):
                    kv.point(layer, piece, self._slot(number, chunk.num_bytes).ctypes.data)
                    is_cold = True
        return is_cold

    def read(self, layer: int, number: int, chosen: int) -> None:
        """Brings what lane `number` has chosen of a layer, whose choices lie at address `chosen`.

        SequenceError where it cannot be read.
        """
        lane = self._lanes[number]
        layout, tokens = lane.layout.layers[layer], len(lane.token_ids)
        found = as_array((ctypes.c_uint8 * (tokens * chosen_bytes(layout))).from_address(chosen))
        shape = (tokens, layout.kv_heads, layout.pieces, PIECE_BLOCKS)
        wanted: NDArray[np.bool_] = np.logical_or.reduce(found.reshape(shape), axis=0)
        reads = _Reads()
        for place, (piece, chunk) in enumerate(_cold(lane.kv, layer)):
            slot = self._slot(place, chunk.num_bytes)
            for first, last in _runs(_pages(layout, wanted[:, piece])):
                self.read_bytes += last - first
                reads.ask(self._store, chunk, piece, slot, first, last)
        failed = reads.wait()
        if failed is not None:
            piece, error = failed
            cause = error if isinstance(error, FlashError) else FlashError(str(error))
            self._slots = []  # a read that hung may write to it
            raise lost(lane.kv, piece, cause) from error

    def _slot(self, number: int, num_bytes: int) -> Bytes:
        """The memory for a lane's piece; pages take RAM when they are first written."""
        assert self._store.spill is not None, "chunks are on flash"
        while len(self._slots) <= number:
            self._slots.append(reserved_bytes(self._store.spill.slot_bytes, huge_pages=False))
        return self._slots[number][:num_bytes]


class _Reads:
    """Reads that are waited for together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = 0
        self._failed: tuple[int, StrataError] | None = None

    def ask(self, store: ChunkStore, chunk: Chunk, piece: int, slot: Bytes, first: int, last: int) -> None:
        """Bytes `first` to `last` of a chunk to where they belong in `slot`."""
        assert store.spill is not None, "chunks are on flash"
        assert chunk.slot is not None, "what is not in RAM is on flash"

        def failed(error: StrataError) -> None:
            with self._changed:
                self._failed = self._failed or (piece, error)
            self._answered()

        with self._changed:
            self._open += 1
        store.spill.submit_part(chunk.slot, first, slot[first:last], self._answered, failed)

    def wait(self) -> tuple[int, StrataError] | None:
        """Until all are answered; the piece of one that failed, and why."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
            return self._failed

    def _answered(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify_all()


def _cold(kv: ProgramKV, layer: int) -> Iterator[tuple[int, Chunk]]:
    """A layer's pieces that lie on flash alone."""
    for piece, chunk in enumerate(kv.chunks(layer)):
        if chunk.memory is None:
            yield piece, chunk


def _pages(layout: KVLayout, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pages of a chunk that hold some of `wanted`, (kv_heads, blocks of a piece)."""
    pages = np.zeros(layout.chunk_bytes // CHUNK_PAGE_BYTES, bool)
    for start, block_bytes in ((0, layout.key_block_bytes), (layout.values_start, layout.value_block_bytes)):
        for block in np.flatnonzero(wanted):
            first = start + int(block) * block_bytes
            pages[first // CHUNK_PAGE_BYTES : -(-(first + block_bytes) // CHUNK_PAGE_BYTES)] = True
    return pages


def _runs(pages: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """First byte and end of every run of pages."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], pages, [False]]).astype(np.int8)))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        yield int(first) * CHUNK_PAGE_BYTES, int(last) * CHUNK_PAGE_BYTES
