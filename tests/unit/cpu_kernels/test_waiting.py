"""Counters that C functions raise and wait for, called by address as a GPU's stream calls them."""

import ctypes
import threading

import pytest

from cpu_kernels.waiting import Counter, HostCall

every_wait = pytest.mark.parametrize("futex", [True, False], ids=["futex", "no futex"])


def call(host_call: HostCall) -> None:
    """As another thread calls it: without Python's lock."""
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(host_call.address)(host_call.argument)


@every_wait
def test_a_call_raises_by_what_it_is_set_to(futex: bool) -> None:
    counter = Counter(futex=futex)
    signal = counter.raise_call(3)
    call(signal)
    signal.value = 5
    call(signal)
    assert (counter.value, signal.value) == (8, 5)


@every_wait
def test_a_call_waits_until_the_target(futex: bool) -> None:
    counter = Counter(futex=futex)
    wait = counter.wait_call()
    call(wait)  # nothing to wait for
    wait.value = 2
    thread = threading.Thread(target=call, args=(wait,))
    thread.start()
    counter.add()
    thread.join(0.02)
    assert thread.is_alive()
    counter.add()
    thread.join(10)
    assert not thread.is_alive()
    assert wait.error == 0


@every_wait
def test_a_failed_counter_ends_the_wait(futex: bool) -> None:
    counter = Counter(futex=futex)
    wait = counter.wait_call(1)
    thread = threading.Thread(target=call, args=(wait,))
    thread.start()
    counter.fail(9)
    thread.join(10)
    assert not thread.is_alive()
    assert wait.error == 9


def test_a_call_keeps_its_counter() -> None:
    signal = Counter().raise_call()
    for _ in range(100):
        call(signal)
    wait = Counter().wait_call(0)
    call(wait)
    assert wait.error == 0
