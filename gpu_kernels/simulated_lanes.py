"""What a simulated GPU works on when: lanes that do one thing after the other, by a clock that is modelled.

Knows nothing of tensors or streams. Times are seconds of `time.perf_counter`. A task ends by the model no earlier than
it takes after the one before; how long the host really worked on it is counted beside that, so that one can see
whether the host was fast enough to play the GPU.
"""

import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

TASKS_KEPT = 1 << 16
_SPIN_S = 30e-6  # a sleep ends that much too late at times
_SET_TIMERSLACK, _SLACK_NS = 29, 1000


@dataclass(frozen=True, slots=True)
class Task:
    """What a lane did, and when by the model."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class LaneTimes:
    """What a lane did since it was last reset."""

    name: str
    busy_s: float  # by the model
    worked_s: float  # that the host needed for it
    tasks: tuple[Task, ...]  # the newest 65536


def chrome_trace(lanes: Sequence[LaneTimes]) -> list[dict[str, object]]:
    """Events of Chrome's trace viewer (Trace Event Format): a thread a lane, microseconds from the first task on."""
    origin = min((task.start_s for lane in lanes for task in lane.tasks), default=0.0)
    names: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": f"simulated {lane.name}"}}
        for number, lane in enumerate(lanes)
    ]
    return names + [
        {
            **{"ph": "X", "name": task.name or lane.name, "pid": 0, "tid": number},
            **{"ts": 1e6 * (task.start_s - origin), "dur": 1e6 * (task.end_s - task.start_s)},
        }
        for number, lane in enumerate(lanes)
        for task in lane.tasks
    ]


class Lane:
    """A part of a GPU that does one thing at a time: its cores and memory, or one direction of its link."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.reset()

    def take(self, name: str, ready_s: float, takes_s: float) -> float:
        """When a task that can begin at `ready_s` will have ended."""
        with self._lock:
            start = max(ready_s, self._free_at)
            self._free_at = start + takes_s
            self._busy_s += takes_s
            self._tasks.append(Task(name, start, self._free_at))
            return self._free_at

    def worked(self, seconds: float) -> None:
        """The host needed so long for a task."""
        with self._lock:
            self._worked_s += seconds

    def times(self) -> LaneTimes:
        """Since the last `reset`."""
        with self._lock:
            return LaneTimes(self.name, self._busy_s, self._worked_s, tuple(self._tasks))

    def reset(self) -> None:
        """Forgets what was done."""
        with self._lock:
            self._busy_s = self._worked_s = 0.0
            self._tasks: deque[Task] = deque(maxlen=TASKS_KEPT)


def sleep_precisely() -> None:
    """Lets this thread's sleeps end in microseconds instead of 50 after their time; elsewhere than on Linux as they do.

    Source: prctl(2), PR_SET_TIMERSLACK.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_TIMERSLACK, *(ctypes.c_ulong(number) for number in (_SLACK_NS, 0, 0, 0)))


def sleep_until(moment_s: float) -> None:
    """Returns then or a little later, not before; sleeps, and spins only at the end."""
    while (left := moment_s - time.perf_counter()) > 0:
        time.sleep(left - _SPIN_S if left > _SPIN_S else 0)
