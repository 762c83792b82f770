"""Reads of KV chunks that lie on flash alone, for one pass at a time: layer after layer, ahead of what is computed.

Chunks go to a ring of slots, in the order in which layers need them; what a pass leaves free is filled with what the
next will need first, if it is like this one. A counter tells the pass's program how many are there, another tells the
thread that asks for reads how many ranges (`cold_plan`) are over, whose slots are free again: between the program and
the reads there is no Python but theirs. Knows nothing about which chunks should be on flash.
"""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.program import Row
from cpu_kernels.waiting import Counter
from offload.closing import Closing
from offload.errors import FlashError, SequenceError, StrataError
from offload.kv_chunks import RANGES, Chunk, ring_slots
from offload.kv_spill import Slot
from offload.memory import HUGE_PAGE_BYTES, read_buffer, reserved_bytes
from runtime.executor.program.cold_plan import ColdPlan, ColdRange, ColdRead, reads_of
from runtime.executor.program.kv_chosen import ChosenReads
from runtime.executor.program.kv_tiers import KVTiers, lost, no_memory
from runtime.executor.program.lanes import Lane

FAILED = 1  # what the counters fail with


@dataclass(slots=True)
class _Pass:
    """The reads of a pass, in order; `ends`: how many there are up to the end of each range."""

    reads: list[ColdRead]
    ends: list[int]
    ring: list[NDArray[np.uint8]]  # a read's slot is that of its number, round and round
    asked: list[tuple[Chunk, Slot]] = field(default_factory=list)
    landed: set[int] = field(default_factory=set)
    next: int = 0  # the first that has not landed
    told: int = 0  # what the program knows of
    open: int = 0  # asked for and not answered
    failure: tuple[ColdRead, StrataError] | None = None


class ColdReads(Closing):
    """For passes over chunks of `tiers` by a model whose layers see so many tokens each, None for all."""

    def __init__(self, tiers: KVTiers, windows: Sequence[int | None]) -> None:
        self._tiers, self._store = tiers, tiers.store
        self._windows = tuple(windows)
        self.chosen = ChosenReads(tiers, windows)
        self.plan = ColdPlan(())  # of the pass under way
        self._arrived, self._freed = Counter(), Counter()
        self._ring: list[NDArray[np.uint8]] = []
        self._changed = threading.Condition()
        self._feeder = ThreadPoolExecutor(1, "strata-kv-feed")  # whose thread begins with the first pass
        self._feeding: Future[None] | None = None
        self._pass: _Pass | None = None
        self._under_way = False  # the pass is not yet over
        self._ahead: _Pass | None = None  # what the next pass will probably read first

    def begin(self, lanes: Sequence[Lane]) -> ColdPlan | None:
        """Reads what a pass over these lanes needs, whose tables then tell where it will be.

        What its program is made for; None where nothing is read. SequenceError where there is no memory to read to.
        """
        self.end()  # of a pass whose end was interrupted
        self._pass, self.plan = None, ColdPlan(())
        if not self._store.cold_bytes:
            self._forget_ahead()
            self.chosen.forget()
            self._ring = []
            return None
        every = range(len(self._windows))
        chosen = [self.chosen.takes(layer, lanes) for layer in every]
        layers = [[] if chosen[layer] else reads_of(layer, self._windows[layer], lanes) for layer in every]
        most = max(len(reads) for reads in layers)
        in_part = self.chosen.slots(lanes, [layer for layer in every if chosen[layer]])
        if not in_part and not most:
            return None
        assert self._store.spill is not None, "chunks are on flash"
        slots = max(ring_slots(len(layers), self._store.spill.slot_bytes, most), 1)
        plan = ColdPlan.of(layers, lanes, max(slots // RANGES, 1))
        reads = [read for of_layer in layers for read in of_layer]
        try:
            its = self._begun(reads, plan.ends, slots, in_part)
        except MemoryError as error:
            raise no_memory(lanes[0].kv, error) from error
        self.chosen.begin(self._ring[len(its.ring) :])
        first = 0
        for layer, of_layer in enumerate(layers):
            for number, read in enumerate(of_layer, first):
                for kv, piece in read.places:
                    kv.point(layer, piece, its.ring[number % slots].ctypes.data)
            first += len(of_layer)
        self._arrived.reset()
        self._freed.reset()
        with self._changed:
            self._pass, self._ahead, self.plan = its, None, plan
            self._tell(its)
        self._under_way = True
        self._feeding = self._feeder.submit(self._feed, its)
        return plan

    def await_row(self, part: ColdRange) -> Row:
        """The row before attention to a range: it is done when the range's chunks are there."""
        return self._arrived.wait_row(part.arrived, name="await_kv")

    def over_row(self) -> Row:
        """The row behind attention to a range: its slots are free."""
        return self._freed.signal_row(name="kv_over")

    def end(self) -> None:
        """The pass is over, whether it failed or not: nothing is read any more but what the next may need first."""
        its = self._pass
        if not self._under_way or its is None:
            return
        if self._freed.value < len(its.ends):
            self._freed.fail(FAILED)
        if self._feeding is None:  # an interrupt came before it was known
            self._feeding = self._feeder.submit(lambda: None)  # over when what was asked for before is
        self._feeding.result()
        self._wait_for(its)
        self._feeding, self._under_way, self._pass = None, False, None
        its.reads = []  # threads that read may know the pass for long: it must not keep sequences that are forgotten
        if its.failure is not None or self.chosen.has_failed:
            self._forget_ahead()
            self._ring = []  # a read that hung may write to it

    def failure(self) -> SequenceError | None:
        """Why the last pass could not go on, if that was a read; asked for once."""
        with self._changed:
            failed = None if self._pass is None else self._pass.failure
        if failed is None:
            return None
        wanted, error = failed
        cause = error if isinstance(error, FlashError) else FlashError(str(error))
        return lost(*wanted.places[0], cause)

    def close(self) -> None:
        """Ends the thread that asks for reads; may be called twice."""
        self._feeder.shutdown()

    def _begun(self, reads: list[ColdRead], ends: list[int], slots: int, others: int) -> _Pass:
        """A pass with these reads: the one that was begun ahead, if it is the same as far as it went.

        Behind its slots the ring has room for `others`.
        """
        its, fits = self._ahead, slots + others <= len(self._ring)
        if its is not None and fits and its.failure is None and len(its.ring) == slots and len(its.asked) <= len(reads):
            pairs = zip(its.asked, reads, strict=False)
            if all(chunk is wanted.chunk and slot is chunk.slot for (chunk, slot), wanted in pairs):
                its.reads, its.ends = reads, ends
                return its
        self._forget_ahead()
        return _Pass(reads, ends, self._slots(slots + others)[:slots])

    def _forget_ahead(self) -> None:
        if self._ahead is not None:
            self._wait_for(self._ahead)
            if self._ahead.failure is not None:
                self._ring = []
            self._ahead = None

    def _wait_for(self, its: _Pass) -> None:
        """Until all of its reads are answered."""
        with self._changed:
            self._changed.wait_for(lambda: not its.open)

    def _slots(self, count: int) -> list[NDArray[np.uint8]]:
        """A ring of so many slots; what it has more stays, within what the limit of RAM has for it."""
        if not count <= len(self._ring) <= max(count, self._tiers.staging_slots):
            assert self._store.spill is not None, "chunks are on flash"
            slot_bytes = self._store.spill.slot_bytes
            self._ring = []
            size = count * slot_bytes
            memory = read_buffer(size) if size >= HUGE_PAGE_BYTES else reserved_bytes(size, huge_pages=False)
            self._ring = list(memory[:size].reshape(count, slot_bytes))
        return self._ring[:count]

    def _feed(self, its: _Pass) -> None:
        """Asks for a pass's reads, each when its slot is free; then for the next one's first, if it will be alike."""
        total, slots = len(its.reads), len(its.ring)
        shift = total % slots
        reads = [ColdRead(wanted.chunk) for wanted in its.reads]
        ahead = _Pass(reads, its.ends, its.ring[shift:] + its.ring[:shift])
        self._ahead = ahead
        for over, before in enumerate([0, *its.ends]):
            room = before + slots
            self._send(its, min(room, total))
            self._send(ahead, min(room - total, total))
            if over < len(its.ends):
                try:
                    self._freed.wait(over + 1)
                except ValueError:  # the pass is over
                    return

    def _send(self, its: _Pass, count: int) -> None:
        """Asks for the first `count` reads, as far as that has not been done."""
        first = len(its.asked)
        with self._changed:
            its.open += max(count - first, 0)
        for number in range(first, count):
            self._ask(its, number)

    def _ask(self, its: _Pass, number: int) -> None:
        chunk, spill = its.reads[number].chunk, self._store.spill
        slot = chunk.slot
        assert slot is not None, "what is not in RAM is on flash"
        assert spill is not None, "chunks are on flash"
        its.asked.append((chunk, slot))

        def done() -> None:
            with self._changed:
                its.landed.add(number)
                while its.next in its.landed:
                    its.next += 1
                self._tell(its)
                self._answered(its)

        def failed(error: StrataError) -> None:
            with self._changed:
                its.failure = its.failure or (its.reads[number], error)
                self._tell(its)
                self._answered(its)

        spill.submit(slot, its.ring[number % len(its.ring)][: slot.num_bytes], done, failed)

    def _tell(self, its: _Pass) -> None:
        """The program of the pass, if it runs, what has arrived in whole ranges; or that something will not."""
        if its is not self._pass:
            return
        if its.failure is not None:
            self._arrived.fail(FAILED)
            self._freed.fail(FAILED)
            return
        whole = bisect_right(its.ends, its.next)
        reached = its.ends[whole - 1] if whole else 0
        if reached > its.told:
            self._arrived.add(reached - its.told)
            its.told = reached

    def _answered(self, its: _Pass) -> None:
        its.open -= 1
        self._changed.notify_all()
