"""How threads wait for each other: they spin, then sleep on a futex, or yield where there is none. And counters.

Knows nothing of programs or pools. A `Counter` is what an I/O thread or a GPU callback publishes and a program's wait
row waits for, or the other way round. Invariant: a counter's value never falls.
"""

import ctypes
import platform
import sys
import time
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.native import (
    Operation,
    atomic_add,
    atomic_load,
    atomic_swap_if,
    call_futex,
    call_plain,
    host_function,
    int_at,
    jitted,
    pause,
)
from cpu_kernels.program import LINE_BYTES, Kind, Row, aligned_int64

BARRIER_SPIN_S = 50e-6  # a wake-up by futex takes 10 to 40 us: below that, spinning is faster
IDLE_SPIN_S = 200e-6

_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238, "i686": 240}


class Setting(IntEnum):
    """Byte offsets in a block of settings."""

    SPIN = 0  # pauses before sleeping
    IDLE_SPIN = 8
    SYSCALL = 16  # address of libc's syscall, or 0
    FUTEX = 24  # number of the system call
    YIELD = 32  # address of sched_yield, or 0
    CLOCK = 40  # address of clock_gettime, or 0


SETTINGS = len(Setting)
SPIN, SYSCALL, FUTEX, YIELD = int(Setting.SPIN), int(Setting.SYSCALL), int(Setting.FUTEX), int(Setting.YIELD)
FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE = 128, 129
EVERYONE = 1 << 30
SPINS_BETWEEN_SLEEPS = 100
COUNTER_ERROR = 8
COUNTER_SLEEPERS = LINE_BYTES


@jitted("void(int64, int64, int64)")
def sleep_on(settings: int, address: int, seen: int) -> None:
    """Sleeps while the low half of the int64 is as it was seen; may wake for no reason; only yields without futex."""
    syscall = int_at(settings + SYSCALL)
    if syscall != 0:
        call_futex(syscall, int_at(settings + FUTEX), address, FUTEX_WAIT_PRIVATE, seen & 0xFFFFFFFF)
    elif int_at(settings + YIELD) != 0:
        call_plain(int_at(settings + YIELD))


@jitted("void(int64, int64)")
def wake(settings: int, address: int) -> None:
    """Wakes everyone who sleeps on the address."""
    syscall = int_at(settings + SYSCALL)
    if syscall != 0:
        call_futex(syscall, int_at(settings + FUTEX), address, FUTEX_WAKE_PRIVATE, EVERYONE)


@jitted("void(int64, int64, int64, int64)")
def wait_until(settings: int, address: int, sleepers: int, target: int) -> None:
    """Returns when the int64 is at least `target`; who raises it looks at the int64 `sleepers` after."""
    spins = int_at(settings + SPIN)
    while atomic_load(address) < target:
        pause()
        spins -= 1
        if spins <= 0:
            atomic_add(sleepers, 1)
            seen = atomic_load(address)
            if seen < target:
                sleep_on(settings, address, seen)
            atomic_add(sleepers, -1)
            spins = SPINS_BETWEEN_SLEEPS


@jitted("int64(int64, int64, int64)")
def wait_for_counter(settings: int, counter: int, target: int) -> int:
    """Returns 0 when the counter has reached the target, or the error that it was failed with."""
    spins = int_at(settings + SPIN)
    while True:
        seen = atomic_load(counter)
        if seen >= target:
            return 0
        error: int = atomic_load(counter + COUNTER_ERROR)
        if error != 0:
            return error
        pause()
        spins -= 1
        if spins <= 0:
            atomic_add(counter + COUNTER_SLEEPERS, 1)
            if atomic_load(counter) == seen and atomic_load(counter + COUNTER_ERROR) == 0:
                sleep_on(settings, counter, seen)
            atomic_add(counter + COUNTER_SLEEPERS, -1)
            spins = SPINS_BETWEEN_SLEEPS


@jitted("void(int64, int64, int64)")
def raise_counter(settings: int, counter: int, amount: int) -> None:
    """Adds to a counter and wakes who waits for it."""
    atomic_add(counter, amount)
    if atomic_load(counter + COUNTER_SLEEPERS) > 0:
        wake(settings, counter)


@jitted("void(int64, int64, int64)")
def fail_counter(settings: int, counter: int, error: int) -> None:
    """Sets a counter's error, unless it has one, and wakes who waits for it."""
    atomic_swap_if(counter + COUNTER_ERROR, 0, error)
    # a futex compares the value alone: sleep_on of one who looked before the error was set must not begin now
    while atomic_load(counter + COUNTER_SLEEPERS) > 0:
        wake(settings, counter)
        pause()


@jitted("void(int64)")
def _pauses(count: int) -> None:
    for _ in range(count):
        pause()


def waiting_settings(*, futex: bool = True) -> NDArray[np.int64]:
    """Settings for this machine; without futex, or where there is none, threads yield instead of sleeping."""
    block = aligned_int64(SETTINGS)
    per_second = _pauses_per_second()
    block[Setting.SPIN // 8] = max(1, int(BARRIER_SPIN_S * per_second))
    block[Setting.IDLE_SPIN // 8] = max(1, int(IDLE_SPIN_S * per_second))
    number = _FUTEX_NUMBERS.get(platform.machine(), 0)
    if futex and sys.platform == "linux" and number and sys.maxsize > 1 << 32:
        block[Setting.SYSCALL // 8] = _address_of("syscall")
        block[Setting.FUTEX // 8] = number
    block[Setting.YIELD // 8] = _address_of("SwitchToThread" if sys.platform == "win32" else "sched_yield")
    if sys.platform != "win32":
        block[Setting.CLOCK // 8] = _address_of("clock_gettime")
    return block


class Counter:
    """A number that grows; threads, programs' rows and callbacks raise it and wait for it."""

    def __init__(self, *, futex: bool = True) -> None:
        self._block = aligned_int64(2 * LINE_BYTES // 8)
        self._settings = waiting_settings(futex=futex)
        self.address = self._block.ctypes.data

    @property
    def value(self) -> int:
        """What it has grown to."""
        return int(self._block[0])

    def add(self, amount: int = 1) -> None:
        """Raises it; ValueError for less than 1."""
        if amount < 1:
            raise ValueError(f"a counter cannot be raised by {amount}")
        raise_counter(self._settings.ctypes.data, self.address, amount)

    def fail(self, error: int) -> None:
        """Ends every wait for more than the present value with this error, which is not 0."""
        if error == 0:
            raise ValueError("0 is not an error")
        fail_counter(self._settings.ctypes.data, self.address, error)

    def wait(self, target: int) -> None:
        """Returns when the value is at least `target`; ValueError when it was failed before."""
        error = wait_for_counter(self._settings.ctypes.data, self.address, target)
        if error:
            raise ValueError(f"a counter failed with code {error} at {self.value}, waiting for {target}")

    def reset(self) -> None:
        """Back to 0 without an error; only while nobody waits."""
        self._block[:2] = 0

    def wait_row(self, target: int, name: str = "wait") -> Row:
        """A row that is done when the value is at least argument 1, `target`."""
        return Row(name, 0, 1, (self.address, target), kind=Kind.WAIT, keep=(self,))

    def signal_row(self, amount: int = 1, name: str = "signal") -> Row:
        """A row that raises the value by argument 1, `amount`."""
        return Row(name, 0, 1, (self.address, amount), kind=Kind.SIGNAL, keep=(self,))

    def raise_call(self, amount: int = 1) -> "HostCall":
        """A call that raises the value by `amount`, for a GPU's stream or another thread without Python."""
        return HostCall(_raise, self, self._settings, amount)

    def wait_call(self, target: int = 0) -> "HostCall":
        """A call that returns when the value is at least `target`, or when the counter fails."""
        return HostCall(_await, self, self._settings, target)


class HostCall:
    """A C function `void f(void *)` and its argument; to be kept until it has been called for the last time."""

    def __init__(self, function: Operation, counter: Counter, settings: NDArray[np.int64], value: int) -> None:
        self._keep = counter, settings
        self._block = aligned_int64(4)  # settings, counter, amount or target, the error of a wait
        self._block[:3] = settings.ctypes.data, counter.address, value
        self.address = function.address

    @property
    def argument(self) -> int:
        """The address that the function is called with."""
        return int(self._block.ctypes.data)

    @property
    def value(self) -> int:
        """By how much a counter is raised, or what is waited for; may be set while nobody calls."""
        return int(self._block[2])

    @value.setter
    def value(self, value: int) -> None:
        self._block[2] = value

    @property
    def error(self) -> int:
        """What the counter was failed with when the last wait for it ended, or 0."""
        return int(self._block[3])


@host_function
def _raise(args: Any) -> None:
    raise_counter(args[0], args[1], args[2])


@host_function
def _await(args: Any) -> None:
    args[3] = wait_for_counter(args[0], args[1], args[2])


def _address_of(function: str) -> int:
    """Of a function of the C library or of Windows' kernel32; 0 where there is none."""
    library = ctypes.CDLL("kernel32" if sys.platform == "win32" else None)
    try:
        return ctypes.cast(getattr(library, function), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def _pauses_per_second() -> float:
    """How fast this CPU spins: 20 to 140 cycles a pause. Measured once."""
    if not _spin_rate:
        count, best = 2000, float("inf")
        for _ in range(3):
            start = time.perf_counter()
            _pauses(count)
            best = min(best, time.perf_counter() - start)
        _spin_rate.append(count / best)
    return _spin_rate[0]


_spin_rate: list[float] = []
