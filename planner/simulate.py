"""A step as it would run: the tasks of a schedule on lanes that each do one at a time.

Event-driven, by the rule that schedules are made for: a lane that is free takes the first task in order whose
predecessors have ended. Knows nothing about models, machines or placements beyond the tasks' seconds.

Invariants: no two tasks of a lane overlap, none starts before its predecessors have ended, and each starts at 0 or at
the very moment another ends. The result is at least the busy time of any lane and at least any chain of dependencies.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import isfinite
from pathlib import Path

from offload.errors import RequestError
from planner.placement import Assignment, PlacementProblem
from planner.schedule import Lane, Task, schedule

_MICROSECONDS = 1e6
_LANES = tuple(Lane)
_LANE_NUMBER = {lane: number for number, lane in enumerate(_LANES)}


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each task runs; seconds from the start of the step."""

    tasks: tuple[Task, ...]
    start: tuple[float, ...]
    end: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Until the last task has ended."""
        return max(self.end, default=0.0)

    @property
    def busy(self) -> Mapping[Lane, float]:
        """Seconds in which each lane works."""
        busy = dict.fromkeys(Lane, 0.0)
        for task in self.tasks:
            busy[task.lane] += task.seconds
        return busy

    def critical_path(self) -> tuple[int, ...]:
        """Tasks, first to last, that follow one another without a gap and take the whole step.

        Behind each of them stands, in time, the predecessor or the task of the same lane that it waited for.
        """
        if not self.tasks:
            return ()
        before = self._before_on_lane()
        path = [max(range(len(self.tasks)), key=lambda index: self.end[index])]
        while (start := self.start[path[-1]]) > 0:
            waited_for = (*self.tasks[path[-1]].after, *before.get(path[-1], ()))
            path.append(next(index for index in waited_for if self.end[index] == start))
        return tuple(reversed(path))

    def critical_seconds(self) -> Mapping[Lane, float]:
        """Seconds of the critical path by lane: what a faster lane could save at most, until another binds."""
        seconds = dict.fromkeys(Lane, 0.0)
        for index in self.critical_path():
            seconds[self.tasks[index].lane] += self.tasks[index].seconds
        return seconds

    @property
    def critical_lane(self) -> Lane:
        """The lane that binds: the one with most of the critical path."""
        seconds = self.critical_seconds()
        return max(Lane, key=lambda lane: seconds[lane])

    def summary(self) -> str:
        """A few lines of text: how busy each lane is, how much of the critical path it has, and which one binds."""
        seconds, busy, critical = self.seconds, self.busy, self.critical_seconds()
        lines = [f"{len(self.tasks)} tasks in {1e3 * seconds:.3f} ms", f"{'lane':<6}{'busy':>7}{'critical':>10}"]
        for lane in Lane:
            shares = (part[lane] / seconds if seconds else 0.0 for part in (busy, critical))
            lines.append("{:<6}{:>7.1%}{:>10.1%}".format(lane.value, *shares))
        return "\n".join([*lines, f"bound by {self.critical_lane.value}"])

    def to_chrome_trace(self) -> str:
        """JSON for chrome://tracing or Perfetto: lanes as threads, complete events in microseconds.

        Format: "Trace Event Format", Google, object form with `traceEvents`.
        """
        events: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": lane.value}}
            for lane, number in _LANE_NUMBER.items()
        ]
        for task, start in zip(self.tasks, self.start, strict=True):
            event: dict[str, object] = {"name": task.name, "cat": task.lane.value, "ph": "X", "pid": 1}
            times = {"ts": start * _MICROSECONDS, "dur": task.seconds * _MICROSECONDS}
            events.append({**event, "tid": _LANE_NUMBER[task.lane], **times})
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False)

    def _before_on_lane(self) -> dict[int, tuple[int]]:
        """The task that each task follows on its lane."""
        before: dict[int, tuple[int]] = {}
        last: dict[Lane, int] = {}
        for index in sorted(range(len(self.tasks)), key=lambda index: (self.start[index], self.end[index])):
            lane = self.tasks[index].lane
            if lane in last:
                before[index] = (last[lane],)
            last[lane] = index
        return before


def simulate(tasks: Sequence[Task]) -> Timeline:
    """When each of `tasks` runs. ValueError for a task that waits for itself or a later one, or of no finite time."""
    for index, task in enumerate(tasks):
        if not (isfinite(task.seconds) and task.seconds >= 0):
            raise ValueError(f"task {index} ({task.name}) takes {task.seconds} seconds")
        if task.after and not 0 <= min(task.after) <= max(task.after) < index:
            raise ValueError(f"task {index} ({task.name}) waits for a task that does not stand before it")
    start, end = _run(tasks)
    return Timeline(tuple(tasks), tuple(start), tuple(end))


def step_seconds(problem: PlacementProblem, assignment: Assignment) -> float:
    """How long a step takes under an assignment."""
    return max(_run(schedule(problem, assignment))[1], default=0.0)


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write the Chrome trace of `timeline`; RequestError where `path` cannot be written."""
    try:
        path.write_text(timeline.to_chrome_trace(), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: the trace cannot be written: {error.strerror}") from error


def _run(tasks: Sequence[Task]) -> tuple[list[float], list[float]]:
    """(start, end) of each task."""
    count = len(tasks)
    start, end = [0.0] * count, [0.0] * count
    lane_of = [_LANE_NUMBER[task.lane] for task in tasks]
    waiting = [0] * count
    following: list[list[int]] = [[] for _ in range(count)]
    ready: list[list[int]] = [[] for _ in _LANES]  # heaps of positions
    for index, task in enumerate(tasks):
        waiting[index] = len(task.after)
        for before in task.after:
            following[before].append(index)
        if not task.after:
            ready[lane_of[index]].append(index)  # rising, which is a heap
    running: list[tuple[float, int]] = []
    now, free = 0.0, set(range(len(_LANES)))
    while True:
        for lane in [lane for lane in free if ready[lane]]:
            index = heappop(ready[lane])
            start[index], end[index] = now, now + tasks[index].seconds
            heappush(running, (end[index], index))
            free.remove(lane)
        if not running:
            return start, end
        now, index = heappop(running)
        ended = [index]
        while running and running[0][0] == now:
            ended.append(heappop(running)[1])
        for index in ended:
            free.add(lane_of[index])
            for behind in following[index]:
                waiting[behind] -= 1
                if not waiting[behind]:
                    heappush(ready[lane_of[behind]], behind)
