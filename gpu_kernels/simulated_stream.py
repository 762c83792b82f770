"""Streams of a simulated GPU: each a thread that takes its work in order and does it on the CPU, in modelled time.

Work is done as soon as its turn comes, a little ahead of the modelled clock, which is waited for wherever the host
could see the difference: before host functions are called, and by whoever waits for an event. So what the threads
themselves cost is hidden as long as the modelled time is longer. Knows nothing about memory limits or what is launched.
"""

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from gpu_kernels.device import CallHost, Copy, Cost, CostOf, Event, Launch, Work, check_copy
from gpu_kernels.simulated_lanes import Lane, sleep_until

if TYPE_CHECKING:
    import torch

log = logging.getLogger("strata.gpu")

CLOSE_S = 10.0  # a host function that still waits after so long is left alone
AHEAD_S = 1e-3  # of the modelled clock that a stream may be

_Part = Callable[[float], object]  # of a stream's work: called with the moment at which it was given
_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Machine(Protocol):
    """What a stream asks its device."""

    def kernel_lane(self, cost: Cost) -> tuple[Lane, float]:
        """What runs kernels, and how long one of this cost takes."""
        ...

    def copy_lane(self, target: "torch.Tensor", source: "torch.Tensor") -> tuple[Lane, float]:
        """What copies one to the other, and how long that takes."""
        ...

    @property
    def host_lock(self) -> threading.Lock:
        """Held while a host function is called: of all streams one at a time, as a driver may do it."""
        ...

    def begin_thread(self) -> None:
        """Called in a stream's thread before it works."""
        ...


class SimulatedEvent:
    """A point in a stream's work."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._at_s = 0.0
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether the work before it has been done, by the modelled clock too."""
        return self._reached.is_set() and time.perf_counter() >= self._at_s

    def synchronize(self) -> None:
        """Returns when the work before it has been done; raises what failed before it."""
        sleep_until(self.wait())
        if self._error is not None:
            raise self._error

    def wait(self) -> float:
        """When the work before it ends by the modelled clock; waits for the work, not for the clock."""
        self._reached.wait()
        return self._at_s

    def reach(self, at_s: float, error: BaseException | None) -> None:
        """The stream is there, or failed before."""
        self._at_s, self._error = at_s, error
        self._reached.set()


class SimulatedStream:
    """Work that happens in order in a thread; see `gpu_kernels.device.Stream`."""

    def __init__(self, name: str, machine: Machine) -> None:
        self.name = name
        self._machine = machine
        self._work: SimpleQueue[tuple[_Part, float] | None] = SimpleQueue()
        self._ready_s = 0.0  # when what was done so far ends by the modelled clock
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"strata-gpu-{name}", daemon=True)
        self._thread.start()

    def launch(self, call: Callable[[], None], cost: CostOf, name: str = "") -> None:
        """Calls it in the stream's thread; asks there for a cost that is a function."""
        self._give(self._launching(Launch(call, cost, name)))

    def copy(self, target: "torch.Tensor", source: "torch.Tensor") -> None:
        """Copies in the stream's thread; ValueError where shapes or types differ."""
        self._give(self._copying(Copy(target, source)))

    def record(self) -> SimulatedEvent:
        """The point after everything given so far."""
        event = SimulatedEvent()
        self._give(lambda given_s: event.reach(max(self._ready_s, given_s), self._error))
        return event

    def wait(self, event: Event) -> None:
        """TypeError for an event of another kind of device."""
        if not isinstance(event, SimulatedEvent):
            raise TypeError(f"{type(event).__name__} is not an event of a simulated GPU")
        self._give(lambda _given_s: self._wait(event))

    def call_host(self, address: int, argument: int) -> None:
        """Calls the C function in the stream's thread, without Python's lock."""
        self._give(self._calling(CallHost(address, argument)))

    def prepare(self, work: Sequence[Work]) -> Callable[[], None]:
        """One thing to give: what is found out here is not found out again, and no thread waits for another's lock."""
        parts = [self._part(each) for each in work]

        def do(given_s: float) -> None:
            for part in parts:
                part(given_s)

        return lambda: self._give(do)

    @property
    def can_capture(self) -> bool:
        """Never: `prepare` leaves nothing to win."""
        return False

    def capture(self, give: Callable[[], None]) -> Callable[[], None]:
        """NotImplementedError."""
        raise NotImplementedError("a simulated GPU has no graphs")

    def synchronize(self) -> None:
        """Returns when all has been done; raises the first error once."""
        event = self.record()
        sleep_until(event.wait())
        error, self._error = self._error, None
        if error is not None:
            raise error

    def begin_close(self) -> None:
        """Leaves out launches and copies that have not begun."""
        if not self._closing:
            self._closing = True
            self._work.put(None)

    def end_close(self) -> None:
        """Waits for the thread, unless a host function does not return."""
        if self._thread is threading.current_thread():
            return
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("a host function on stream %s of the simulated GPU does not return: left alone", self.name)

    def _give(self, work: _Part) -> None:
        if self._closing:
            raise ValueError(f"stream {self.name} was closed")
        self._work.put((work, time.perf_counter()))

    def _run(self) -> None:
        """The thread's life."""
        self._machine.begin_thread()
        while (given := self._work.get()) is not None:
            work, given_s = given
            work(given_s)

    def _part(self, work: Work) -> _Part:
        if isinstance(work, Launch):
            return self._launching(work)
        return self._copying(work) if isinstance(work, Copy) else self._calling(work)

    def _launching(self, launch: Launch) -> _Part:
        call, cost, name, machine = launch.call, launch.cost, launch.name, self._machine
        if isinstance(cost, Cost):
            lane, takes_s = machine.kernel_lane(cost)
            return lambda given_s: self._do(call, name, lane, lambda: takes_s, given_s)
        lane, _ = machine.kernel_lane(Cost())
        return lambda given_s: self._do(call, name, lane, lambda: machine.kernel_lane(cost())[1], given_s)

    def _copying(self, copy: Copy) -> _Part:
        target, source = copy.target, copy.source
        check_copy(target, source)
        lane, takes_s = self._machine.copy_lane(target, source)
        return lambda given_s: self._do(lambda: target.copy_(source), "copy", lane, lambda: takes_s, given_s)

    def _calling(self, call: CallHost) -> _Part:
        function, argument = _HostFunction(call.address), call.argument
        return lambda given_s: self._call(function, argument, given_s)

    def _do(
        self, call: Callable[[], object], name: str, lane: Lane, takes_s: Callable[[], float], given_s: float
    ) -> None:
        if self._closing or self._error is not None:
            return
        start = time.perf_counter()
        try:
            self._ready_s = lane.take(name, max(self._ready_s, given_s), takes_s())
            call()
        except BaseException as error:  # noqa: BLE001 - raised again by `synchronize`
            self._error = error
        end = time.perf_counter()
        lane.worked(end - start)
        if self._ready_s - end > AHEAD_S:
            time.sleep(self._ready_s - end - AHEAD_S)

    def _wait(self, event: SimulatedEvent) -> None:
        self._ready_s = max(self._ready_s, event.wait())

    def _call(self, function: Callable[[int], None], argument: int, given_s: float) -> None:
        sleep_until(max(self._ready_s, given_s))
        with self._machine.host_lock:
            function(argument)
        self._ready_s = time.perf_counter()
