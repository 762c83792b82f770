"""Reads of the blocks of KV chunks on flash that a layer's tokens have chosen, once they have.

What was chosen of a lane is put in one slot for each of its pieces on flash, which all lanes and layers share: a layer
is over before the next one chooses. It comes from flash, or from a cache of what is chosen most; a slot's other bytes
are anything. Knows nothing about how blocks are chosen.
"""

import ctypes
import logging
from collections.abc import Sequence

import numpy as np
from numpy.ctypeslib import as_array
from numpy.typing import NDArray

from cpu_kernels.kv_layout import PIECE_BLOCKS, KVLayout
from cpu_kernels.kv_select import chosen_bytes
from cpu_kernels.pair_reads import copy_pairs
from offload.errors import FlashError
from offload.kv_chunks import Chunk
from offload.pair_cache import PairCache
from offload.spilled_pairs import PairedSlot, PairReads, SpilledPairs
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_groups import pairs_of
from runtime.executor.program.kv_tiers import KVTiers, lost
from runtime.executor.program.lanes import Lane

log = logging.getLogger("strata.kv")

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


class ChosenReads:
    """For passes over chunks of `tiers`, one at a time."""

    def __init__(self, tiers: KVTiers, windows: Sequence[int | None]) -> None:
        self._tiers = tiers
        self._windows = tuple(windows)
        self._lanes: Sequence[Lane] = ()
        self._layers: Sequence[int] = ()
        self._slots: Sequence[Bytes] = ()
        self._places = np.empty(0, np.int64)  # addresses of slots
        self.cache: PairCache | None = None
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
        self._slots, self._places = slots, np.array([slot.ctypes.data for slot in slots], np.int64)
        for kv in {lane.kv for lane in self._lanes}:
            for layer in self._layers:
                for (piece, _), place in zip(_cold(kv, layer), self._places, strict=False):
                    kv.point(layer, piece, int(place))
        if self._layers:
            self._begin_cache(self._lanes[0].layout.layers)

    def read(self, layer: int, number: int, chosen: int) -> None:
        """Brings what lane `number` has chosen of a layer, whose choices lie at address `chosen`.

        SequenceError where it cannot be read.
        """
        lane = self._lanes[number]
        layout, cold = lane.layout.layers[layer], _cold(lane.kv, layer)
        if not cold:
            return
        slots, places = [_paired(chunk) for _, chunk in cold], self._places[: len(cold)]
        wanted = _wanted(layout, len(lane.token_ids), chosen)[[piece for piece, _ in cold]]
        found = room = np.zeros(wanted.shape, np.int64)
        if self.cache is not None:
            found, room = self.cache.take(slots, wanted)
        runs = runs_of(wanted & (found == 0), SpilledPairs.longest_run(slots[0].pairs))
        reads = PairReads(slots, runs, places, room, (self._slots, self.cache, room))
        try:
            failed = self._pairs.read(reads, lambda: _copy(slots[0], found, places))
        except BaseException:
            self.forget()
            raise
        if failed is not None:
            at, error = failed
            cause = error if isinstance(error, FlashError) else FlashError(str(error))
            self.forget()
            self.has_failed = True
            raise lost(lane.kv, cold[at][0], cause) from error

    def forget(self) -> None:
        """Nothing is kept of what was read."""
        self.cache = None

    @property
    def _pairs(self) -> SpilledPairs:
        spill = self._tiers.store.spill
        assert spill is not None and spill.pairs is not None, "chunks are on flash, to be read in part"
        return spill.pairs

    def _begin_cache(self, layouts: Sequence[KVLayout]) -> None:
        """There is one, if there is memory for it."""
        try:
            self._pairs.drain()  # of a pass that was interrupted
            if self.cache is None:
                paired = [pairs_of(layouts[layer]) for layer in self._layers]
                most_bytes = self._tiers.most_bytes or 0
                self.cache = PairCache(paired[0].count, max(pairs.pair_bytes for pairs in paired), most_bytes)
            self.cache.begin(self._tiers.cache_bytes)
        except MemoryError as error:
            log.warning("KV: there is no memory (%s) to keep what is chosen most; it is read each time", error)
            self.forget()
        except FlashError as error:
            log.warning("KV: %s; it is read another way from now on", error)
            self.forget()


def runs_of(wanted: NDArray[np.bool_], longest: int) -> Ints:
    """(runs, 3) of what is wanted, (rows, columns), side by side in a row: row, first column, how many.

    None goes beyond a multiple of `longest`.
    """
    before, behind = np.zeros_like(wanted), np.zeros_like(wanted)
    before[:, 1:], behind[:, :-1] = wanted[:, :-1], wanted[:, 1:]
    before[:, ::longest] = behind[:, longest - 1 :: longest] = False
    rows, firsts = np.nonzero(wanted & ~before)
    _, lasts = np.nonzero(wanted & ~behind)
    return np.stack([rows, firsts, lasts - firsts + 1], axis=1)


def _wanted(layout: KVLayout, tokens: int, chosen: int) -> NDArray[np.bool_]:
    """(pieces, kv_heads * blocks): what so many tokens have chosen, whose choices lie at an address."""
    found = as_array((ctypes.c_uint8 * (tokens * chosen_bytes(layout))).from_address(chosen))
    shape = (tokens, layout.kv_heads, layout.pieces, PIECE_BLOCKS)
    wanted: NDArray[np.bool_] = np.logical_or.reduce(found.reshape(shape), axis=0)
    return wanted.transpose(1, 0, 2).reshape(layout.pieces, -1)


def _copy(slot: PairedSlot, found: Ints, places: Ints) -> None:
    """Pairs from the addresses `found`, (slots, pairs), 0 for none, to where they belong in slots at `places`."""
    row, pair = np.nonzero(found)
    pairs = slot.pairs
    firsts = places[row] + pair * pairs.first_bytes
    seconds = places[row] + pairs.seconds_start + pair * pairs.second_bytes
    copy_pairs(found[row, pair], firsts, seconds, pairs.first_bytes, pairs.second_bytes)


def _cold(kv: ProgramKV, layer: int) -> list[tuple[int, Chunk]]:
    """A layer's pieces that lie on flash alone."""
    return [(piece, chunk) for piece, chunk in enumerate(kv.chunks(layer)) if chunk.memory is None]


def _paired(chunk: Chunk) -> PairedSlot:
    assert chunk.slot is not None and chunk.slot.paired is not None, "written to be read in part"
    return chunk.slot.paired
