"""The placement problem as a mixed-integer linear program, solved by HiGHS through `scipy.optimize.milp`.

Minimises `planner.stages.objective_seconds`: a binary for each option of each item, for each stage its time and which
devices it uses, the hand-overs between stages, and the time of the whole. Knows nothing about models.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from offload.tiers import Device
from planner.placement import Assignment, PlacementProblem
from planner.stages import flash_seconds, link_seconds, stages

EXACT_OPTIONS = 400  # more binaries than these are solved to `LARGE_GAP` of the optimum
LARGE_GAP = 2e-3
_SCALE = 1e3  # times in milliseconds and sizes in MiB keep the coefficients near 1
_MIB = 1 << 20
_SLACK = 1e-5  # MiB: HiGHS meets a bound to 1e-6, and an assignment must not exceed a memory by a byte


def solve_milp(problem: PlacementProblem, *, time_limit_s: float = 2.0) -> Assignment | None:
    """The best assignment, or the best one found within the limit; None where nothing fits or none was found."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415 - takes 0.2 s, and few plans need it

    program = _Program(problem)
    matrix, lower, upper = program.constraints()
    gap = 1e-9 if program.num_options <= EXACT_OPTIONS else LARGE_GAP
    with _quiet():
        result = milp(
            program.costs(),
            constraints=LinearConstraint(matrix, lower, upper),
            integrality=program.integrality(),
            bounds=Bounds(0, program.upper_bounds()),
            options={"time_limit": time_limit_s, "mip_rel_gap": gap},
        )
    if result.x is None:
        return None
    assignment = program.assignment(result.x)
    return assignment if problem.fits(assignment) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing reaches stdout: HiGHS prints a line of its own now and then, whatever it is told."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class _Program:
    """Columns: options of all items; for each stage its time, CPU used, GPU used, hand-over to each; then the total."""

    def __init__(self, problem: PlacementProblem) -> None:
        self._problem = problem
        self._stages = stages(problem)
        self._first = np.cumsum([0, *(len(item.options) for item in problem.items)]).tolist()
        self.num_options = int(self._first[-1])
        self._total = self.num_options + 5 * len(self._stages)
        self._rows: list[Mapping[int, float]] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._choices()
        self._memories()
        self._times()

    def costs(self) -> Any:
        costs = np.zeros(self._total + 1)
        costs[self._total] = 1
        return costs

    def integrality(self) -> Any:
        """The options; what follows from them is continuous."""
        integral = np.zeros(self._total + 1)
        integral[: self.num_options] = 1
        return integral

    def upper_bounds(self) -> Any:
        bounds = np.full(self._total + 1, np.inf)
        bounds[: self.num_options] = 1
        return bounds

    def constraints(self) -> tuple[Any, Any, Any]:
        """(matrix, lower, upper)."""
        from scipy.sparse import csr_array  # noqa: PLC0415

        counts = [len(row) for row in self._rows]
        columns = [column for row in self._rows for column in row]
        values = [value for row in self._rows for value in row.values()]
        starts = np.cumsum([0, *counts])
        shape = (len(self._rows), self._total + 1)
        return csr_array((values, columns, starts), shape=shape), np.array(self._lower), np.array(self._upper)

    def assignment(self, solution: Any) -> Assignment:
        """The options that a solution chose."""
        bounds = zip(self._first, self._first[1:], strict=False)
        return tuple(int(np.argmax(solution[first:end])) for first, end in bounds)

    def _add(self, row: Mapping[int, float], lower: float, upper: float) -> None:
        self._rows.append(row)
        self._lower.append(lower)
        self._upper.append(upper)

    def _choices(self) -> None:
        """One option for each item."""
        for first, end in zip(self._first, self._first[1:], strict=False):
            self._add(dict.fromkeys(range(first, end), 1.0), 1, 1)

    def _memories(self) -> None:
        options = [option for item in self._problem.items for option in item.options]
        for sizes, room in (
            ([option.ram_bytes for option in options], self._problem.ram_bytes),
            ([option.gpu_bytes for option in options], self._problem.gpu_bytes),
        ):
            row = {column: size / _MIB for column, size in enumerate(sizes) if size}
            self._add(row, -np.inf, room / _MIB - _SLACK)

    def _times(self) -> None:
        """Times of the stages, of the loading lanes, and of the whole, which is at least each of them."""
        whole = {self._total: 1.0}
        for number, stage in enumerate(self._stages):
            time, *used = (self.num_options + 5 * number + part for part in range(3))
            whole[time] = -1.0
            for part, device in enumerate((Device.CPU, Device.GPU)):
                handover = time + 3 + part
                compute = {handover: -_SCALE * self._problem.handover_s}
                for index in stage.items:
                    uses: dict[int, float] = {used[part]: 1.0}
                    for column, option in self._columns(index):
                        if option.device is device:
                            compute[column] = -_SCALE * option.compute_s
                            uses[column] = -1.0
                    if len(uses) > 1:
                        self._add(uses, 0, np.inf)
                self._add({time: 1.0, **compute}, 0, np.inf)
                if number:
                    other_before = self.num_options + 5 * (number - 1) + 2 - part
                    self._add({handover: 1.0, used[part]: -1.0, other_before: -1.0}, -1, np.inf)
            if stage.routed:
                for seconds in (flash_seconds, link_seconds):
                    self._at_least(time, seconds, stage.items)
        self._add(whole, 0, np.inf)
        for seconds in (flash_seconds, link_seconds):
            self._at_least(self._total, seconds, range(len(self._problem.items)))

    def _at_least(self, time: int, seconds: Any, items: Any) -> None:
        """A time of at least the sum of what the chosen options of `items` spend on a lane."""
        row = {time: 1.0}
        for index in items:
            for column, option in self._columns(index):
                if spent := seconds(option):
                    row[column] = -_SCALE * spent
        if len(row) > 1:
            self._add(row, 0, np.inf)

    def _columns(self, index: int) -> Any:
        return enumerate(self._problem.items[index].options, start=self._first[index])
