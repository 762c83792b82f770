"""Reads of the blocks of KV chunks on flash that a layer's tokens have chosen, once they have.

What was chosen of a lane is read to one slot for each of its pieces on flash, which all lanes and layers share: a layer
is over before the next one chooses. Only pages that hold chosen blocks are read, and checked; a slot's other bytes are
anything. Knows nothing about how blocks are chosen.
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.ctypeslib import as_array
from numpy.typing import NDArray

from cpu_kernels.kv_layout import CHUNK_PAGE_BYTES, PIECE_BLOCKS, KVLayout
from cpu_kernels.kv_select import chosen_bytes
from offload.errors import FlashError, StrataError
from offload.kv_chunks import Chunk, ChunkStore
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_tiers import lost
from runtime.executor.program.lanes import Lane

Bytes = NDArray[np.uint8]

READ_RANGES = 8  # that one thread reads, so that all have about as much to do


class ChosenReads:
    """For passes over chunks of `store`, one at a time."""

    def __init__(self, store: ChunkStore, windows: Sequence[int | None]) -> None:
        self._store = store
        self._windows = tuple(windows)
        self._lanes: Sequence[Lane] = ()
        self._layers: Sequence[int] = ()
        self._slots: Sequence[Bytes] = ()
        self.has_failed = False  # in this pass

    def takes(self, layer: int, lanes: Sequence[Lane]) -> bool:
        """Whether blocks of a layer are chosen by all lanes."""
        return self._windows[layer] is None and all(
            lane.layout.budget_tokens > 0
            and lane.layout.abstracts is not None
            and lane.layout.abstracts.layers[layer] is not None
            for lane in lanes
        )

    def slots(self, lanes: Sequence[Lane], layers: Sequence[int]) -> int:
        """How many a pass over these lanes needs that chooses in `layers`."""
        self._lanes, self._layers, self.has_failed = lanes, layers, False
        return max((len(_cold(lane.kv, layer)) for lane in lanes for layer in layers), default=0)

    def begin(self, slots: Sequence[Bytes]) -> None:
        """That pass's tables tell where what is chosen will be."""
        self._slots = slots
        for kv in {lane.kv for lane in self._lanes}:
            for layer in self._layers:
                for (piece, _), slot in zip(_cold(kv, layer), slots, strict=False):
                    kv.point(layer, piece, slot.ctypes.data)

    def read(self, layer: int, number: int, chosen: int) -> None:
        """Brings what lane `number` has chosen of a layer, whose choices lie at address `chosen`.

        SequenceError where it cannot be read.
        """
        lane = self._lanes[number]
        layout, tokens = lane.layout.layers[layer], len(lane.token_ids)
        cold = _cold(lane.kv, layer)
        found = as_array((ctypes.c_uint8 * (tokens * chosen_bytes(layout))).from_address(chosen))
        shape = (tokens, layout.kv_heads, layout.pieces, PIECE_BLOCKS)
        wanted: NDArray[np.bool_] = np.logical_or.reduce(found.reshape(shape), axis=0)
        of_pieces = wanted.transpose(1, 0, 2)[[piece for piece, _ in cold]]
        reads = _Reads()
        for (piece, chunk), slot, ranges in zip(cold, self._slots, _ranges(layout, of_pieces), strict=False):
            for first in range(0, len(ranges), READ_RANGES):
                reads.ask(self._store, chunk, piece, slot, ranges[first : first + READ_RANGES])
        failed = reads.wait()
        if failed is not None:
            piece, error = failed
            cause = error if isinstance(error, FlashError) else FlashError(str(error))
            self.has_failed = True
            raise lost(lane.kv, piece, cause) from error


class _Reads:
    """Reads that are waited for together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = 0
        self._failed: tuple[int, StrataError] | None = None

    def ask(self, store: ChunkStore, chunk: Chunk, piece: int, slot: Bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """Ranges of a chunk's bytes to where they belong in `slot`."""
        assert store.spill is not None, "chunks are on flash"
        assert chunk.slot is not None, "what is not in RAM is on flash"

        def failed(error: StrataError) -> None:
            with self._changed:
                self._failed = self._failed or (piece, error)
            self._answered()

        with self._changed:
            self._open += 1
        store.spill.submit_parts(chunk.slot, ranges, slot[: chunk.num_bytes], self._answered, failed)

    def wait(self) -> tuple[int, StrataError] | None:
        """Until all are answered; the piece of one that failed, and why."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
            return self._failed

    def _answered(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify_all()


def _cold(kv: ProgramKV, layer: int) -> list[tuple[int, Chunk]]:
    """A layer's pieces that lie on flash alone."""
    return [(piece, chunk) for piece, chunk in enumerate(kv.chunks(layer)) if chunk.memory is None]


def _ranges(layout: KVLayout, wanted: NDArray[np.bool_]) -> Iterator[list[tuple[int, int]]]:
    """Of each piece first byte and end of every run of pages that hold some of `wanted`, (pieces, kv_heads, blocks)."""
    starts, ends = _block_pages(layout)
    blocks = np.concatenate([wanted.reshape(len(wanted), -1)] * 2, axis=1)  # keys, then values
    edges = np.zeros((len(wanted), layout.chunk_bytes // CHUNK_PAGE_BYTES + 1), np.int32)
    pieces, chosen = np.nonzero(blocks)
    np.add.at(edges, (pieces, starts[chosen]), 1)
    np.add.at(edges, (pieces, ends[chosen]), -1)
    pages = np.cumsum(edges, axis=1) > 0
    for changes in np.diff(pages.astype(np.int8), axis=1, prepend=0):
        first, last = np.flatnonzero(changes > 0), np.flatnonzero(changes < 0)
        yield [
            (int(start) * CHUNK_PAGE_BYTES, int(end) * CHUNK_PAGE_BYTES) for start, end in zip(first, last, strict=True)
        ]


@cache
def _block_pages(layout: KVLayout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first page of every block of a chunk, of keys and then of values, and the one behind its last."""
    blocks = np.arange(layout.kv_heads * PIECE_BLOCKS)
    sizes = (layout.key_block_bytes, layout.value_block_bytes)
    firsts = np.concatenate([blocks * sizes[0], layout.values_start + blocks * sizes[1]])
    ends = firsts + np.repeat(sizes, len(blocks))
    return firsts // CHUNK_PAGE_BYTES, -(-ends // CHUNK_PAGE_BYTES)
