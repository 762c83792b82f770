"""Threads running programs: all work once and in order, waiting, errors, idleness, preemption, shutdown."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels import interpreter
from cpu_kernels import pool as pool_module
from cpu_kernels.cores import allowed_cpus, performance_cpus
from cpu_kernels.native import atomic_add, int_at, operation, set_int
from cpu_kernels.pool import OperationError, Pool
from cpu_kernels.program import Kind, Parameter, Program, Row
from cpu_kernels.waiting import Counter

THREADS = (1, 2, 3, 5)
every_count = pytest.mark.parametrize("threads", THREADS)
every_wait = pytest.mark.parametrize("futex", [True, False], ids=["futex", "no futex"])


@operation
def count_items(args: Any, begin: int, end: int) -> None:
    """Adds 1 to the int64 of every item."""
    for item in range(begin, end):
        atomic_add(args[0] + 8 * item, 1)


@operation
def shift(args: Any, begin: int, end: int) -> None:
    """out[i] = x[(i + 1) % n] * 3 + 1: needs all of the row before."""
    for item in range(begin, end):
        set_int(args[0] + 8 * item, int_at(args[1] + 8 * ((item + 1) % args[2])) * 3 + 1)


@operation
def fail_at(args: Any, begin: int, end: int) -> None:
    """Sets the status to argument 1 at item argument 2."""
    for item in range(begin, end):
        if item == args[2]:
            set_int(args[0], args[1])


@operation
def work(args: Any, begin: int, end: int) -> None:
    """Some time."""
    value = 1
    for _ in range((end - begin) * args[1]):
        value = value * 6364136223846793005 + (value >> 7)
    set_int(args[0], value)


def address(array: NDArray[Any]) -> int:
    return array.ctypes.data


@every_wait
@every_count
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 12)), min_size=1, max_size=12))
def test_every_item_is_done_once(threads: int, futex: bool, sizes: list[tuple[int, int]]) -> None:
    counts = [np.zeros(max(items, 1), np.int64) for items, _ in sizes]
    program = Program(
        Row("count", count_items, items, (address(at),), chunk=chunk)
        for (items, chunk), at in zip(sizes, counts, strict=True)
    )
    with Pool(threads, futex=futex) as pool:
        for runs in (1, 2, 3):
            pool.run(program)
            assert all((at[:items] == runs).all() for (items, _), at in zip(sizes, counts, strict=True))


@every_wait
@every_count
def test_a_row_begins_when_the_one_before_is_over(threads: int, futex: bool) -> None:
    size, rows = 37, 200
    buffers = [np.arange(size), np.zeros(size, np.int64)]
    expected = buffers[0].copy()
    program = Program()
    for row in range(rows):
        source, target = buffers[row % 2], buffers[1 - row % 2]
        program.add(Row("shift", shift, size, (address(target), address(source), size), chunk=row % 3))
        expected = np.roll(expected, -1) * 3 + 1
    with Pool(threads, futex=futex) as pool:
        for _ in range(20):
            buffers[0][:] = np.arange(size)
            pool.run(program)
            assert (buffers[rows % 2] == expected).all()


def test_rows_may_change_between_runs() -> None:
    counts = np.zeros(100, np.int64)
    program = Program(
        [Row("count", count_items, Parameter("items"), (address(counts),)), Row("none", 0, 5, kind=Kind.NOTHING)]
    )
    with Pool(2) as pool:
        for items in (1, 100, 0, 40):
            program.set("items", items)
            pool.run(program)
        assert counts.tolist() == [3] + [2] * 39 + [1] * 60
        pool.run(Program())


@every_count
def test_an_error_code_ends_the_run(threads: int) -> None:
    counts = np.zeros(64, np.int64)
    program = Program()
    program.add(Row("count", count_items, 64, (address(counts),)))
    program.add(Row("fail", fail_at, 64, (program.status_address, 7, 33)))
    program.add(Row("count again", count_items, 64, (address(counts),)))
    with Pool(threads) as pool:
        with pytest.raises(OperationError, match="operation 'fail' failed with code 7") as failure:
            pool.run(program)
        assert (failure.value.row, failure.value.code) == ("fail", 7)
        assert (counts == 1).all()
        program.patch(1, 2, -1)
        pool.run(program)
        assert (counts == 3).all()


@every_count
def test_an_exception_of_a_python_row_surfaces(threads: int) -> None:
    calls: list[str] = []

    def call() -> None:
        calls.append("call")
        if calls.count("call") == 2:
            raise KeyError("from the row")

    program = Program()
    program.add_call("call", call)
    program.add_call("after", lambda: calls.append("after"))
    with Pool(threads) as pool:
        pool.run(program)
        with pytest.raises(KeyError, match="from the row"):
            pool.run(program)
        pool.run(program)
    assert calls == ["call", "after", "call", "call", "after"]


def test_a_worker_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: int) -> int:
        raise MemoryError("no memory for a worker")

    monkeypatch.setattr(interpreter, "follow", broken)
    counts = np.zeros(8, np.int64)
    with Pool(2) as pool:
        time.sleep(0.05)
        with pytest.raises(RuntimeError, match="a worker thread ended by an exception") as failure:
            pool.run(Program([Row("count", count_items, 8, (address(counts),))]))
    assert isinstance(failure.value.__cause__, MemoryError)
    assert (counts == 1).all(), "the others did its work"


@every_wait
@every_count
def test_wait_and_signal(threads: int, futex: bool) -> None:
    ready, done = Counter(futex=futex), Counter(futex=futex)
    counts = np.zeros(16, np.int64)
    program = Program()
    wait = program.add(ready.wait_row(1))
    program.add(Row("count", count_items, 16, (address(counts),)))
    program.add(done.signal_row(2))
    with Pool(threads, futex=futex) as pool:
        for turn in range(1, 4):
            program.patch(wait, 1, turn)
            runner = threading.Thread(target=pool.run, args=(program,))
            runner.start()
            time.sleep(0.02)
            assert (counts == turn - 1).all()
            ready.add()
            done.wait(2 * turn)
            runner.join()
            assert (counts == turn).all()
            assert done.value == 2 * turn


@pytest.mark.parametrize("spin_s", [0.0, 0.1])
def test_threads_that_wait_spin_or_sleep(spin_s: float) -> None:
    ready, counts = Counter(), np.zeros(16, np.int64)
    program = Program([ready.wait_row(1), Row("count", count_items, 16, (address(counts),))])
    with Pool(2, spin_s=spin_s) as pool:
        waking = threading.Timer(0.02, ready.add)
        waking.start()
        used_s = time.process_time()
        pool.run(program)
        used_s = time.process_time() - used_s
        waking.join()
    assert (counts == 1).all()
    assert (used_s > 0.005) == (spin_s > 0)


@every_wait
def test_a_counter_that_fails_ends_the_run(futex: bool) -> None:
    ready = Counter(futex=futex)
    counts = np.zeros(4, np.int64)
    program = Program([ready.wait_row(1, "flash"), Row("count", count_items, 4, (address(counts),))])
    with Pool(2, futex=futex) as pool:
        failing = threading.Timer(0.02, ready.fail, (5,))
        failing.start()
        with pytest.raises(OperationError, match="'flash' failed with code 5"):
            pool.run(program)
        failing.join()
        assert not counts.any()
        with pytest.raises(ValueError, match="failed with code 5 at 0, waiting for 1"):
            ready.wait(1)
        ready.reset()
        ready.add(1)
        pool.run(program)
        assert counts.all()
    with pytest.raises(ValueError, match="raised by 0"):
        ready.add(0)
    with pytest.raises(ValueError, match="0 is not an error"):
        ready.fail(0)


@every_wait
def test_an_idle_pool_uses_no_cpu(futex: bool) -> None:
    counts = np.zeros(8, np.int64)
    with Pool(3, futex=futex) as pool:
        pool.run(Program([Row("count", count_items, 8, (address(counts),))]))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.03


@pytest.mark.parametrize("futex", [True, False])
def test_many_short_runs_with_pauses(futex: bool) -> None:
    counts = np.zeros(8, np.int64)
    program = Program([Row("count", count_items, 8, (address(counts),))] * 3)
    with Pool(3, futex=futex) as pool:
        for turn in range(300):
            pool.run(program)
            if turn % 10 == 0:
                time.sleep(0.0007)
    assert (counts == 900).all()


def test_one_run_at_a_time() -> None:
    counts = np.zeros(32, np.int64)
    with Pool(2) as pool:

        def runs() -> None:
            program = Program([Row("count", count_items, 32, (address(counts),))] * 5)
            for _ in range(50):
                pool.run(program)

        threads = [threading.Thread(target=runs) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (counts == 750).all()


def test_times_of_rows() -> None:
    sink = np.zeros(1, np.int64)
    program = Program([Row("work", work, 8, (address(sink), 100_000)), Row("little", work, 8, (address(sink), 1))])
    times = np.zeros(3, np.int64)
    with Pool(2) as pool:
        start = time.monotonic_ns()
        pool.run(program, times)
        end = time.monotonic_ns()
        with pytest.raises(ValueError, match="times of int64"):
            pool.run(program, np.zeros(2, np.int64))
    assert start <= times[0] <= times[1] <= times[2] <= end
    assert times[1] - times[0] > times[2] - times[1]


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.slow
def test_competing_processes_do_not_stop_the_pool() -> None:
    """Spinning barriers fall to a tenth of the speed of one thread or below when another process takes a core."""
    sink = np.zeros(1, np.int64)
    program = Program([Row("work", work, 64, (address(sink), 1000))] * 200)

    def seconds(threads: int) -> float:
        with Pool(threads) as pool:
            pool.run(program)
            taken = []
            for _ in range(5):
                start = time.perf_counter()
                pool.run(program)
                taken.append(time.perf_counter() - start)
            return float(np.median(taken))

    competitors = [
        multiprocessing.get_context("spawn").Process(target=_spin, args=(6,)) for _ in range(len(allowed_cpus()) // 2)
    ]
    for competitor in competitors:
        competitor.start()
    try:
        time.sleep(1)
        alone, together = seconds(1), seconds(len(allowed_cpus()))
    finally:
        for competitor in competitors:
            competitor.terminate()
            competitor.join()
    assert together < 2.5 * alone


def test_closing() -> None:
    pool = Pool(3)
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("strata-")]
    assert len(names) >= 2
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        pool.run(Program())
    other = Pool(2)
    workers = other._workers
    del other
    gc.collect()
    assert not any(worker.is_alive() for worker in workers), "a forgotten pool ends its threads"
    with pytest.raises(ValueError, match="a pool of 0 threads"):
        Pool(0)


@pytest.mark.parametrize("futex", [True, False])
def test_the_interpreter_exits_with_an_open_pool(futex: bool) -> None:
    imports = "from cpu_kernels.pool import Pool; from cpu_kernels.program import Program"
    code = f"{imports}; p = Pool(3, futex={futex}); p.run(Program()); print('done')"
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_was_forked_may_use_the_pool() -> None:
    counts = np.zeros(8, np.int64)
    with Pool(2) as pool:
        program = Program([Row("count", count_items, 8, (address(counts),))])
        pool.run(program)
        child = os.fork()
        if child == 0:
            pool.run(program)
            os._exit(0 if (counts == 2).all() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_keep_to_the_cpus_they_are_given() -> None:
    cpus = frozenset({min(allowed_cpus())})
    before = allowed_cpus()
    seen: list[frozenset[int]] = []
    program = Program()
    program.add_call("where", lambda: seen.append(allowed_cpus()))
    with Pool(2, cpus=cpus) as pool:
        pool.run(program)
    assert seen == [cpus]
    assert allowed_cpus() == before


def test_performance_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpu_kernels.cores.allowed_cpus", lambda: frozenset(range(4)))

    def machine(name: str, file: str, speeds: list[int]) -> Path:
        for cpu, speed in enumerate(speeds):
            path = tmp_path / name / f"cpu{cpu}" / file
            path.parent.mkdir(parents=True)
            path.write_text(f"{speed}\n")
        return tmp_path / name

    frequency = "cpufreq/cpuinfo_max_freq"
    assert performance_cpus(machine("hybrid", frequency, [5200000, 5000000, 3800000, 3800000])) == {0, 1}
    assert performance_cpus(machine("arm", "cpu_capacity", [400, 400, 1024, 950])) == {2, 3}
    assert performance_cpus(machine("equal", frequency, [4000000, 4000000, 4100000, 4100000])) is None
    assert performance_cpus(machine("partly", frequency, [4000000, 2000000])) is None
    assert performance_cpus(tmp_path / "nothing") is None
    assert pool_module.performance_cpus is performance_cpus
