"""Threads that read runs of pairs from a file, many at a time, without the interpreter lock.

Thousands of reads of 16 KiB take a processor more time to ask for from Python than a drive to answer. What cannot be
read or is not right is told, not tried again. Knows nothing about what pairs hold. A batch that takes longer than the
deadline is given up while its threads still hang: what such reads bring later is thrown away.
"""

import ctypes
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.pair_reads import CALL_FIELDS, GIVEN_UP, PAGE_BYTES, Calls, Job, Result, serve
from cpu_kernels.program import aligned_int64
from offload.closing import Closing
from offload.errors import FlashError
from offload.memory import read_buffer

DEPTH = 48  # 50 MiB in 14 batches of 16 KiB reads took 49 ms with 16, 44 with 32, 40 with 48, 40 and 42 with 64
RUN_BYTES = 128 << 10  # of pairs that a read should bring at most
MOST_BYTES = RUN_BYTES + 2 * PAGE_BYTES  # that it can: pairs may begin and end within a page
MOST_JOBS = 4096  # at a time: a pipe of 64 KiB holds the addresses of twice as many

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Batch:
    """So many jobs, how many of them are left, when they began, and what they write to."""

    jobs: int
    left: Ints
    started_s: float
    keep: object


class PairReader(Closing):
    """Reads a file of this path, one batch at a time; OSError where it cannot be opened, or there are no pipes."""

    def __init__(self, path: Path, *, direct: bool, deadline_s: float) -> None:
        self.num_bytes = 0  # read so far
        self.busy_s = 0.0  # while a batch was under way
        self.is_stuck = False  # a batch was given up: its reads may still write
        self._deadline_s = deadline_s
        self._file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        self._jobs, self._ask = os.pipe()
        self._over, self._tell = os.pipe()
        self._told = select.poll()
        self._told.register(self._over, select.POLLIN)
        libc = ctypes.CDLL(None)
        self._calls = aligned_int64(CALL_FIELDS)
        for call, name in ((Calls.READ, "read"), (Calls.WRITE, "write"), (Calls.PREAD, "pread")):
            self._calls[call] = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value or 0
        self._calls[Calls.JOBS], self._calls[Calls.OVER] = self._jobs, self._tell
        self._batch: _Batch | None = None  # under way, or given up
        self._threads: list[threading.Thread] = []
        self._closed = False

    def run(self, jobs: Ints, meanwhile: Callable[[], None], keep: object) -> Ints:
        """Makes reads, (jobs, JOB_FIELDS), of which FILE, BATCH and RESULT are set here; whose RESULT is not DONE.

        `meanwhile` is called while they are under way; `keep`: what they write to. FlashError where there is no memory
        for them, and for a batch that takes longer than the deadline, and ever after.
        """
        self.drain()
        if self._closed or self.is_stuck:
            raise FlashError("a read of a file that was closed or given up")
        self._ask_for(jobs[:MOST_JOBS], keep)
        meanwhile()
        for first in range(MOST_JOBS, len(jobs), MOST_JOBS):
            self._ask_for(jobs[first : first + MOST_JOBS], keep)
        self.drain()
        self.num_bytes += int(jobs[:, Job.NUM_BYTES].sum())
        return np.flatnonzero(jobs[:, Job.RESULT] != Result.DONE)

    def drain(self) -> None:
        """Returns when nothing is read any more, but by reads that hang; FlashError where they begin to be such."""
        batch = self._batch
        if batch is None or self.is_stuck:
            return
        end = batch.started_s + self._deadline_s
        while not self._told.poll(1e3 * max(end - time.monotonic(), 0.0)):
            if time.monotonic() >= end:
                batch.left[0], self.is_stuck = GIVEN_UP, True
                raise FlashError(
                    f"reading {batch.jobs} parts of a file has taken more than {self._deadline_s:g} s",
                    hint="check the drive (kernel log, SMART); a network drive may have lost its server",
                )
        os.read(self._over, 8)
        self.busy_s += time.monotonic() - batch.started_s
        self._batch = None

    def close(self) -> None:
        """Ends the threads, except those that hang; may be called twice."""
        if self._closed:
            return
        self._closed = True
        os.close(self._ask)
        if self.is_stuck:
            return
        for thread in self._threads:
            thread.join()
        for descriptor in (self._jobs, self._over, self._tell, self._file):
            os.close(descriptor)

    def _ask_for(self, jobs: Ints, keep: object) -> None:
        """Begins a batch, once the one before it is over."""
        self.drain()
        if not len(jobs):
            return
        self._begin()
        left = aligned_int64(1)
        left[0] = len(jobs)
        jobs[:, Job.FILE], jobs[:, Job.BATCH] = self._file, left.ctypes.data
        jobs[:, Job.RESULT] = Result.PENDING
        places = jobs.ctypes.data + np.arange(len(jobs)) * jobs.strides[0]
        self._batch = _Batch(len(jobs), left, time.monotonic(), (jobs, keep))
        os.write(self._ask, places.tobytes())

    def _begin(self) -> None:
        """The threads, at the first batch. FlashError where there is no memory for them."""
        if self._threads:
            return
        try:
            memory = read_buffer(DEPTH * MOST_BYTES)
        except MemoryError as error:
            raise FlashError(f"there is no memory to read to: {error}", hint="give it more RAM (--budget)") from error
        for number in range(DEPTH):
            own = memory[number * MOST_BYTES : (number + 1) * MOST_BYTES]
            thread = threading.Thread(target=self._serve, args=(own,), name=f"strata-pairs-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, memory: NDArray[np.uint8]) -> None:
        message = aligned_int64(1)
        serve(self._calls.ctypes.data, message.ctypes.data, memory.ctypes.data)
