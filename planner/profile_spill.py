"""How fast chunks of keys and values come back from a drive, checked, and what that takes from who computes meanwhile.

Measured with the spill file itself, in a process of its own, so that its memory does not count as the caller's. Knows
nothing about models.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import bandwidth
from offload.errors import FlashError, StrataError
from offload.flash_probe import filesystem_key
from offload.kv_spill import Slot, SpillFile
from offload.memory import read_buffer
from offload.pairs import Pairs
from planner.apart import FAILURES, measured_apart
from planner.machine import SpillRates
from planner.profile import Profile, ensured

log = logging.getLogger("strata.planner.profile_spill")

SLOT_BYTES = 1 << 20
SLOTS = 96
RING_SLOTS = 16
PART_BYTES = 8 << 10  # a KV head's keys or values of 64 tokens, heads of 64 in float16
PAIRS = Pairs(SLOT_BYTES // (2 * PART_BYTES), PART_BYTES, PART_BYTES)
PARTS_APART = 4  # of so many pairs one is read
_LEAST_S = 0.2
_LIMIT_S = 60


def with_spill_rates(profile: Profile, folder: Path, path: Path | None = None) -> Profile:
    """`profile` with the rates of the drive that `folder` lies on, measured and stored where they are not known yet.

    FlashError where they cannot be measured.
    """
    key = filesystem_key(folder)

    def measured(known: Profile) -> Profile:
        return replace(known, spills={**known.spills, key: measure_apart(folder, known.threads)})

    return ensured(profile, lambda known: key in known.spills, measured, path)


def spill_rates(profile: Profile, folder: Path) -> SpillRates:
    """Those of the drive that a folder lies on, as in `with_spill_rates`."""
    return with_spill_rates(profile, folder).spills[filesystem_key(folder)]


def measure_apart(folder: Path, threads: int) -> SpillRates:
    """`measure` in a process of its own; FlashError where that fails."""
    try:
        return measured_apart(SpillRates, __name__, str(folder), threads, limit_s=_LIMIT_S)
    except FAILURES as error:
        raise FlashError(f"the drive of {folder} cannot be measured: {error}", hint="leave out --kv-ram") from error


def measure(folder: str | Path, threads: int) -> SpillRates:
    """Writes 192 MiB and reads them for a second: alone, while `threads` threads read RAM, and in parts.

    FlashError where the drive fails.
    """
    data = read_buffer(SLOT_BYTES)[:SLOT_BYTES]
    data[:] = np.random.default_rng(0).integers(0, 256, SLOT_BYTES, np.uint8)
    ring = list(read_buffer(RING_SLOTS * SLOT_BYTES)[: RING_SLOTS * SLOT_BYTES].reshape(RING_SLOTS, SLOT_BYTES))
    with SpillFile(Path(folder), SLOT_BYTES, in_parts=True) as spill:
        slots = [spill.write(data) for _ in range(SLOTS)]
        paired = [spill.write(data, PAIRS) for _ in range(SLOTS)]
        alone = _rate(lambda: _read_whole(spill, slots, ring))
        parts = _rate(lambda: _read_parts(spill, paired, ring))
        with _Computing(threads) as computing:
            free = computing.rate(lambda: time.sleep(_LEAST_S))
            found: list[float] = []
            slowed = computing.rate(lambda: found.append(_rate(lambda: _read_whole(spill, slots, ring))))
    return SpillRates(alone, found[0], min(slowed / free, 1.0), parts)


class _Computing:
    """Threads that read RAM until they are told to end, as products and attention do."""

    def __init__(self, threads: int) -> None:
        buffer = bandwidth.make_buffer(bandwidth.buffer_bytes()).view(np.uint32)
        self._parts = np.array_split(buffer, threads)
        self._done = [0] * threads  # bytes
        self._over = False
        self._threads = [threading.Thread(target=self._read, args=(number,)) for number in range(threads)]

    def __enter__(self) -> "_Computing":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        for thread in self._threads:
            thread.join()

    def rate(self, work: Callable[[], object]) -> float:
        """Bytes a second that the threads read while `work` is done."""
        before, started = sum(self._done), time.perf_counter()
        work()
        return (sum(self._done) - before) / (time.perf_counter() - started)

    def _read(self, number: int) -> None:
        pieces = np.array_split(self._parts[number], 64)
        while not self._over:
            for piece in pieces:
                np.maximum.reduce(piece)
                self._done[number] += piece.nbytes


def _read_whole(spill: SpillFile, slots: Sequence[Slot], ring: Sequence[NDArray[np.uint8]]) -> int:
    reads = _Reads(spill)
    for number, slot in enumerate(slots):
        spill.submit(slot, ring[number % RING_SLOTS], *reads.answers())
    return reads.bytes()


def _read_parts(spill: SpillFile, slots: Sequence[Slot], ring: Sequence[NDArray[np.uint8]]) -> int:
    from offload.spilled_pairs import PairReads  # noqa: PLC0415 - brings llvmlite and numba

    assert spill.pairs is not None, "opened for it"
    before = spill.read_bytes
    for first in range(0, len(slots), RING_SLOTS):
        paired = [slot.paired for slot in slots[first : first + RING_SLOTS] if slot.paired is not None]
        runs = [(at, pair, 1) for at in range(len(paired)) for pair in range(0, PAIRS.count, PARTS_APART)]
        places = np.array([place.ctypes.data for place in ring], np.int64)
        copies = np.zeros((len(paired), PAIRS.count), np.int64)
        failed = spill.pairs.read(PairReads(paired, np.array(runs, np.int64), places, copies, ring), lambda: None)
        if failed is not None:
            raise failed[1]
    return spill.read_bytes - before


class _Reads:
    """Reads of a spill file that are waited for together."""

    def __init__(self, spill: SpillFile) -> None:
        self._spill, self._before = spill, spill.read_bytes
        self._asked = 0
        self._answered = threading.Semaphore(0)
        self._failed: StrataError | None = None

    def answers(self) -> tuple[Callable[[], None], Callable[[StrataError], None]]:
        """What a read calls when it is done or has failed."""
        self._asked += 1
        return self._answered.release, self._fail

    def bytes(self) -> int:
        """Bytes of all, when they are there."""
        for _ in range(self._asked):
            self._answered.acquire()
        if self._failed is not None:
            raise self._failed
        return self._spill.read_bytes - self._before

    def _fail(self, error: StrataError) -> None:
        self._failed = error
        self._answered.release()


def _rate(read: Callable[[], int]) -> float:
    """Bytes a second of reads that go on for a while."""
    done, spent, started = 0, 0.0, time.perf_counter()
    while spent < _LEAST_S:
        done += read()
        spent = time.perf_counter() - started
    return done / spent
