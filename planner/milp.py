"""The placement problem as a mixed-integer linear program, solved by HiGHS through `scipy.optimize.milp`.

Minimises `planner.stages.objective_seconds`: a binary for each option of each item, for each stage its time and which
devices it uses, the hand-overs between stages, and the time of the whole. Knows nothing about models.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offload.tiers import Device
from planner.placement import Assignment, Option, PlacementProblem
from planner.stages import flash_seconds, link_seconds, stages

EXACT_OPTIONS = 140  # binaries, of a dense model of 16 layers: more are left to `planner.patterns`
NODE_LIMIT = 1_000_000  # more than a search takes that ends in seconds
_GAP = 1e-9
SCALE = 1e3  # times in milliseconds and sizes in MiB keep the coefficients near 1
MIB = 1 << 20
SLACK = 1e-5  # MiB: HiGHS meets a bound to 1e-6, and an assignment must not exceed a memory by a byte


@dataclass(frozen=True, slots=True)
class Prices:
    """What a layer's second, its second of reading flash and of the link, and its MiB of each memory cost."""

    second: float
    flash_s: float
    link_s: float
    ram_mib: float
    gpu_mib: float

    def of(self, option: Option) -> float:
        """What an option costs beside the time of its stage."""
        loads = SCALE * (self.flash_s * flash_seconds(option) + self.link_s * link_seconds(option))
        return loads + (self.ram_mib * option.ram_bytes + self.gpu_mib * option.gpu_bytes) / MIB


def solve_milp(
    problem: PlacementProblem, *, time_limit_s: float = 2.0, node_limit: int = NODE_LIMIT
) -> Assignment | None:
    """The best assignment, or the best one found within the limits; None where nothing fits or none was found."""
    program = Program(problem)
    return program.solve(program.costs(), gap=_GAP, time_limit_s=time_limit_s, node_limit=node_limit)


@contextmanager
def quiet() -> Iterator[None]:
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


class Program:
    """Columns: options of all items; for each stage its time, CPU used, GPU used, hand-over to each; then the total.

    `cyclic` items are those of a layer among others of the same pattern: the first stage follows the last one.
    """

    def __init__(self, problem: PlacementProblem, *, cyclic: bool = False) -> None:
        self._problem = problem
        self._cyclic = cyclic
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
        """Those of the objective: the total alone."""
        costs = np.zeros(self._total + 1)
        costs[self._total] = 1
        return costs

    def priced(self, prices: Prices) -> Any:
        """Costs of the stages' times, of the loading lanes and of the memories at these prices."""
        costs = np.zeros(self._total + 1)
        options = [option for item in self._problem.items for option in item.options]
        costs[: self.num_options] = [prices.of(option) for option in options]
        costs[self.num_options : self._total : 5] = prices.second
        return costs

    def solve(self, costs: Any, *, gap: float, time_limit_s: float, node_limit: int = NODE_LIMIT) -> Assignment | None:
        """The assignment that costs least, to a relative `gap`; None where nothing fits or none was found in time."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415 - takes 0.2 s, few plans need it

        matrix, lower, upper = self.constraints()
        with quiet():
            result = milp(
                costs,
                constraints=LinearConstraint(matrix, lower, upper),
                integrality=self.integrality(),
                bounds=Bounds(0, self.upper_bounds()),
                options={"time_limit": time_limit_s, "mip_rel_gap": gap, "node_limit": node_limit},
            )
        if result.x is None:
            return None
        assignment = self.assignment(result.x)
        return assignment if self._problem.fits(assignment) else None

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
            row = {column: size / MIB for column, size in enumerate(sizes) if size}
            self._add(row, -np.inf, room / MIB - SLACK)

    def _times(self) -> None:
        """Times of the stages, of the loading lanes, and of the whole, which is at least each of them."""
        whole = {self._total: 1.0}
        for number, stage in enumerate(self._stages):
            time, *used = (self.num_options + 5 * number + part for part in range(3))
            whole[time] = -1.0
            for part, device in enumerate((Device.CPU, Device.GPU)):
                handover = time + 3 + part
                compute = {handover: -SCALE * self._problem.handover_s}
                for index in stage.items:
                    uses: dict[int, float] = {used[part]: 1.0}
                    for column, option in self._columns(index):
                        if option.device is device:
                            compute[column] = -SCALE * option.compute_s
                            uses[column] = -1.0
                    if len(uses) > 1:
                        self._add(uses, 0, np.inf)
                self._add({time: 1.0, **compute}, 0, np.inf)
                if number or self._cyclic:
                    other_before = self.num_options + 5 * ((number - 1) % len(self._stages)) + 2 - part
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
                    row[column] = -SCALE * spent
        if len(row) > 1:
            self._add(row, 0, np.inf)

    def _columns(self, index: int) -> Any:
        return enumerate(self._problem.items[index].options, start=self._first[index])
