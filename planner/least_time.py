"""A bound below the simulated step of any assignment, quick to find: what no order of work can undercut.

Stages follow one another, each takes at least the work of its busiest device and, where a router decides its loads,
those too; a loading lane takes at least the sum of its loads. Hand-overs are left out, since they can hide. So what is
bound above a step that was simulated need not be simulated itself.
"""

from typing import Any

import numpy as np

from offload.tiers import Device
from planner.placement import Assignment, Option, PlacementProblem
from planner.stages import flash_seconds, link_seconds, stages

_ROUNDING = 1 - 1e-9  # sums of another order of addition


class LeastTime:
    """The bounds of one problem's assignments."""

    def __init__(self, problem: PlacementProblem) -> None:
        order = stages(problem)
        self._starts = [stage.items[0] for stage in order]
        self._routed = np.array([float(stage.routed) for stage in order])
        known: dict[int, Any] = {}  # items of like layers share their options
        options = [item.options for item in problem.items]
        for each in options:
            if id(each) not in known:
                known[id(each)] = np.array([_lanes(option) for option in each])
        self._first = np.cumsum([0, *(len(each) for each in options)])[:-1]
        self._lanes = np.concatenate([known[id(each)] for each in options])  # (options, lanes)

    def seconds(self, assignment: Assignment) -> float:
        """The least that a step can take."""
        chosen = self._lanes[self._first + assignment]
        cpu, gpu, flash, link = np.add.reduceat(chosen, self._starts, axis=0).T
        routed = np.maximum(flash, link) * self._routed
        total = np.maximum(np.maximum(cpu, gpu), routed).sum()
        return float(max(total, flash.sum(), link.sum()) * _ROUNDING)


def _lanes(option: Option) -> tuple[float, float, float, float]:
    """Seconds on the CPU, the GPU, flash and the link."""
    on_cpu = option.device is Device.CPU
    compute = (option.compute_s, 0.0) if on_cpu else (0.0, option.compute_s)
    return *compute, flash_seconds(option), link_seconds(option)
