"""Reads of some of the pairs of a spill file's slots: quickly where that goes, else as whole slots are read.

Quickly is without Python for each read (`pair_reader`). What fails there, on systems without it, and where reads are
watched or made to fail (`gguf_source.positional_read`), every run is a read of its own that is tried again. Every page
is compared with its checksum before anything of it is used. Knows nothing about what pairs hold.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.pair_reads import (
    ADDRESS_BYTES,
    JOB_FIELDS,
    PAGE_BYTES,
    Job,
    Result,
    page_sums,
    pages_are_right,
    place_pairs,
)
from offload import gguf_source
from offload.closing import Closing
from offload.countdown import Countdown
from offload.errors import FlashError, StrataError
from offload.pair_reader import MOST_BYTES, RUN_BYTES, PairReader
from offload.pairs import Pairs

log = logging.getLogger("strata.kv")

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Careful = Callable[[int, int, Callable[[Bytes], bool], Callable[[Bytes], None], Callable[[StrataError], None]], None]
"""(offset, bytes, whether they are right, what to do with them, what with an error): a read that is tried again."""


@dataclass(frozen=True, slots=True, eq=False)
class PairedSlot:
    """A slot's number, where it begins in the file, how its bytes are paired there, and its pages' checksums."""

    number: int
    offset: int
    pairs: Pairs
    sums: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class PairReads:
    """What is read of `slots`, whose pairs are alike.

    `runs`: (runs, 3): of which slot, the first pair, how many. `memory`: by slot the address of its bytes, which lie
    there as before they were written. `copies`: (slots, pairs): addresses that pairs are copied to as they lie in the
    file, or 0. `keep`: what owns all that memory.
    """

    slots: Sequence[PairedSlot]
    runs: Ints
    memory: Ints
    copies: Ints
    keep: object

    def jobs(self) -> Ints:
        """(runs, JOB_FIELDS): see `Job`."""
        jobs = np.zeros((len(self.runs), JOB_FIELDS), np.int64)
        if not len(jobs):
            return jobs
        pairs, (at, first, count) = self.slots[0].pairs, self.runs.T
        starts, ends = first * pairs.pair_bytes, (first + count) * pairs.pair_bytes
        begin = starts // PAGE_BYTES * PAGE_BYTES
        sums = np.array([slot.sums.ctypes.data for slot in self.slots], np.int64)
        jobs[:, Job.OFFSET] = np.array([slot.offset for slot in self.slots], np.int64)[at] + begin
        jobs[:, Job.NUM_BYTES] = -(-ends // PAGE_BYTES) * PAGE_BYTES - begin
        jobs[:, Job.SUMS] = sums[at] + begin // PAGE_BYTES * ADDRESS_BYTES
        jobs[:, Job.SKIPPED], jobs[:, Job.COUNT] = starts - begin, count
        jobs[:, Job.FIRST_BYTES], jobs[:, Job.SECOND_BYTES] = pairs.first_bytes, pairs.second_bytes
        jobs[:, Job.FIRST] = self.memory[at] + first * pairs.first_bytes
        jobs[:, Job.SECOND] = self.memory[at] + pairs.seconds_start + first * pairs.second_bytes
        jobs[:, Job.COPIES] = self.copies.ctypes.data + (at * pairs.count + first) * ADDRESS_BYTES
        return jobs


class SpilledPairs(Closing):
    """For the file of this path; `careful` reads it where that must be tried again."""

    def __init__(self, path: Path, careful: Careful, *, direct: bool, deadline_s: float) -> None:
        """OSError where the file cannot be opened."""
        self._path, self._careful = path, careful
        plainly = gguf_source.reads_plainly()
        self._quick = PairReader(path, direct=direct, deadline_s=deadline_s) if plainly else None

    @property
    def num_bytes(self) -> int:
        """Bytes that were read quickly so far."""
        return 0 if self._quick is None else self._quick.num_bytes

    @property
    def busy_s(self) -> float:
        """Seconds during which something was."""
        return 0.0 if self._quick is None else self._quick.busy_s

    @staticmethod
    def slot(number: int, offset: int, pairs: Pairs, data: Bytes) -> PairedSlot:
        """A slot in which such bytes, paired, lie from byte `offset` on."""
        return PairedSlot(number, offset, pairs, page_sums(data))

    @staticmethod
    def longest_run(pairs: Pairs) -> int:
        """Pairs that one run may have."""
        return max(RUN_BYTES // pairs.pair_bytes, 1)

    def read(self, reads: PairReads, meanwhile: Callable[[], None]) -> tuple[int, StrataError] | None:
        """Returns when all is read, and `meanwhile` was called; the slot of one that cannot be read, and why.

        Memory may still be written to after a failure.
        """
        jobs = reads.jobs()
        quick = self._quick
        longest = int(jobs[:, Job.NUM_BYTES].max(initial=0))
        if quick is None or quick.is_stuck or longest > MOST_BYTES or not gguf_source.reads_plainly():
            meanwhile()
            failed: Sequence[int] = range(len(jobs))
        else:
            try:
                failed = quick.run(jobs, meanwhile, reads).tolist()
            except FlashError as error:
                return 0, error
        return self._read_again(reads, jobs, failed) if failed else None

    def drain(self) -> None:
        """Returns when nothing is read any more: after a read that was interrupted. FlashError for one that hangs."""
        if self._quick is not None:
            self._quick.drain()

    def close(self) -> None:
        """Ends the reads; may be called twice."""
        if self._quick is not None:
            self._quick.close()

    def _read_again(self, reads: PairReads, jobs: Ints, numbers: Sequence[int]) -> tuple[int, StrataError] | None:
        over = threading.Event()
        left = Countdown(len(numbers), over.set)
        failures: list[tuple[int, StrataError]] = []
        for number in numbers:
            offset, num_bytes = int(jobs[number, Job.OFFSET]), int(jobs[number, Job.NUM_BYTES])
            if jobs[number, Job.RESULT] == Result.NOT_RIGHT:
                log.warning("%s: byte %d: wrong checksum; reading it again", self._path, offset)
            self._careful(offset, num_bytes, *_answers(reads, jobs, number, left, failures))
        over.wait()
        return failures[0] if failures else None


def _answers(
    reads: PairReads, jobs: Ints, number: int, left: Countdown, failures: list[tuple[int, StrataError]]
) -> tuple[Callable[[Bytes], bool], Callable[[Bytes], None], Callable[[StrataError], None]]:
    """Of a read that is tried again, as `Careful` wants them."""
    job = jobs.ctypes.data + number * jobs.strides[0]
    num_bytes, sums = int(jobs[number, Job.NUM_BYTES]), int(jobs[number, Job.SUMS])

    def is_right(data: Bytes) -> bool:
        return bool(pages_are_right(data.ctypes.data, num_bytes, sums))

    def take(data: Bytes) -> None:
        place_pairs(job, data.ctypes.data)
        left.one_less()

    def failed(error: StrataError) -> None:
        failures.append((int(reads.runs[number, 0]), error))
        left.one_less()

    return is_right, take, failed
