"""Threads that run programs: the caller and `threads - 1` workers, without Python between the rows.

Workers spin for a moment after a run, then sleep (an idle pool uses no CPU). Where cores differ in speed, all threads
keep to the fast ones during a run. Knows nothing of what programs compute. Invariant: between runs no worker touches a
program, so that tables and buffers may be changed or freed.
"""

import os
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import interpreter
from cpu_kernels.cores import performance_cpus
from cpu_kernels.interpreter import Control
from cpu_kernels.program import LINE_BYTES, Program, aligned_int64
from cpu_kernels.waiting import BARRIER_SPIN_S, Setting, waiting_settings

MAX_THREADS = 1024


class OperationError(ValueError):
    """An operation of a program set an error code; the rows after it were not run."""

    def __init__(self, row: str, code: int) -> None:
        super().__init__(f"operation {row!r} failed with code {code}")
        self.row = row
        self.code = code


class Pool:
    """A context manager; `run` may be called from any thread, one run goes at a time."""

    def __init__(
        self,
        threads: int,
        *,
        futex: bool = True,
        cpus: frozenset[int] | None = None,
        spin_s: float = BARRIER_SPIN_S,
    ) -> None:
        """`futex=False` makes idle workers wait on Python's conditions, as they do where there are no futexes.

        `cpus`: where to run; None for the performance cores where cores differ, else anywhere. `spin_s`: how long
        threads that wait in a run spin before they sleep.
        ValueError for fewer than 1 or more than 1024 threads.
        """
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"a pool of {threads} threads")
        self.threads = threads
        self._cpus = performance_cpus() if cpus is None else cpus
        self._lock = threading.Lock()
        self._shared = _Shared(threads, futex, spin_s)
        self._workers = [
            threading.Thread(target=_work, args=(self._shared, index, self._cpus), name=f"strata-{index}", daemon=True)
            for index in range(1, threads)
        ]
        for worker in self._workers:
            worker.start()
        # also runs at the interpreter's exit: no thread may be in jitted code when that is freed
        self._close = weakref.finalize(self, _stop, self._shared, self._workers)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers after the current run; may be called twice."""
        with self._lock:
            self._close()

    def run(self, program: Program, times_ns: NDArray[np.int64] | None = None) -> None:
        """Runs every row. `times_ns` (rows + 1): gets the clock before the first and after each row.

        Raises what a `Program.add_call` row raised, `OperationError` for an operation's error code, and RuntimeError
        for a worker that ended by an exception; ValueError after `close`.
        """
        table = program.table()
        if times_ns is not None and (times_ns.dtype != np.int64 or times_ns.shape != (len(program) + 1,)):
            raise ValueError(f"times of {times_ns.dtype} {times_ns.shape} for {len(program)} rows")
        with self._lock:
            if not self._close.alive:
                raise ValueError("the pool is closed")
            program.clear_status()
            shared = self._shared
            shared.describe(table, program, times_ns)
            with _OnCpus(self._cpus):
                shared.run()
            self._raise(program)

    def _raise(self, program: Program) -> None:
        if self._shared.worker_error is not None:
            raise RuntimeError("a worker thread ended by an exception") from self._shared.worker_error
        failure = program.take_failure()
        if failure is not None:
            raise failure
        if program.status:
            raise OperationError(program.names[self._shared.field(Control.FAILED_ROW)], program.status)


class _Shared:
    """What the pool and its workers share; does not refer to the pool, so that a forgotten pool is closed."""

    def __init__(self, threads: int, futex: bool, spin_s: float) -> None:
        self.block = aligned_int64((Control.SLOTS + LINE_BYTES * threads) // 8)
        self.address = self.block.ctypes.data
        settings = waiting_settings(futex=futex)
        settings[Setting.SPIN // 8] = max(1, int(settings[Setting.SPIN // 8] * (spin_s / BARRIER_SPIN_S)))
        self.block[Control.SETTINGS // 8 :][: len(settings)] = settings
        self.block[Control.THREADS // 8] = threads
        self.block[Control.FIRST_NUMBER // 8] = 1
        self.has_futex = bool(settings[Setting.SYSCALL // 8])
        self.has_clock = bool(settings[Setting.CLOCK // 8])
        self.idle = threading.Condition()
        self.worker_error: BaseException | None = None

    def field(self, field: Control) -> int:
        """One number of the control block."""
        return int(self.block[field // 8])

    def describe(self, table: NDArray[np.int64], program: Program, times_ns: NDArray[np.int64] | None) -> None:
        """Writes what the next run is."""
        if times_ns is not None and not self.has_clock:
            raise NotImplementedError("no clock for the times of rows on this system")
        block = self.block
        block[Control.TABLE // 8] = table.ctypes.data
        block[Control.ROWS // 8] = len(table)
        block[Control.STATUS // 8] = program.status_address
        block[Control.TICKS // 8] = 0 if times_ns is None else times_ns.ctypes.data
        block[Control.FAILED_ROW // 8] = -1

    def run(self) -> None:
        """The caller's part."""
        if self.has_futex or self.field(Control.THREADS) == 1:
            interpreter.run(self.address)
            return
        interpreter.open_run(self.address)
        with self.idle:
            self.idle.notify_all()
        interpreter.lead_run(self.address)

    def sleep(self, epoch: int) -> None:
        """Waits for the next run without a futex."""
        with self.idle:
            self.idle.wait_for(lambda: self.field(Control.EPOCH) != epoch or self.field(Control.STOP) != 0)


class _OnCpus:
    """Keeps the calling thread to some CPUs for a while; does nothing for None or where it is not possible."""

    def __init__(self, cpus: frozenset[int] | None) -> None:
        self._cpus = cpus if cpus and hasattr(os, "sched_setaffinity") else None
        self._before: set[int] = set()

    def __enter__(self) -> None:
        if self._cpus:
            self._before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._cpus)

    def __exit__(self, *_: object) -> None:
        if self._cpus:
            os.sched_setaffinity(0, self._before)


def _work(shared: _Shared, index: int, cpus: frozenset[int] | None) -> None:
    """A worker thread's life."""
    try:
        with _OnCpus(cpus):
            epoch = 0
            while (epoch := interpreter.follow(shared.address, index, epoch)) >= 0:
                shared.sleep(epoch)
    except BaseException as error:  # noqa: BLE001 - raised by the next Pool.run
        shared.worker_error = error


def _stop(shared: _Shared, workers: list[threading.Thread]) -> None:
    interpreter.stop(shared.address)
    with shared.idle:
        shared.idle.notify_all()
    for worker in workers:
        if worker is not threading.current_thread():
            worker.join()
