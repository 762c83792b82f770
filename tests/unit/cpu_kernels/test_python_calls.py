"""Python functions called by rows of a program."""

import pytest

from cpu_kernels.pool import OperationError, Pool
from cpu_kernels.program import Program, Row
from cpu_kernels.python_calls import PythonCalls


def test_what_a_call_raises_ends_the_run_and_is_told_once() -> None:
    calls, program, seen = PythonCalls(), Program(), []

    def fail(number: int) -> None:
        seen.append(number)
        raise KeyError("no such thing")

    program.add(Row("fail", calls.callback(fail, program.status_address), 1))
    program.add_call("after", lambda: seen.append(99))
    with Pool(1) as pool, pytest.raises(OperationError):
        pool.run(program)
    assert seen == [0]
    assert isinstance(calls.take_failure(), KeyError)
    assert calls.take_failure() is None


def test_one_failure_does_not_stay_for_the_next_run() -> None:
    calls, program, seen = PythonCalls(), Program(), []

    def fail_first(number: int) -> None:
        seen.append(number)
        if len(seen) == 1:
            raise KeyError("once")

    program.add(Row("fail", calls.callback(fail_first, program.status_address), 1))
    with Pool(1) as pool:
        with pytest.raises(OperationError):
            pool.run(program)
        calls.take_failure()
        pool.run(program)
    assert seen == [0, 0]
    assert calls.take_failure() is None
