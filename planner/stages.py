"""The objective that solvers work with: a step as stages that follow one another, in closed form.

A stage is one item, or the routed items of a layer, which are computed side by side as they arrive. It takes as long as
the busiest of its lanes, hand-overs included; loads that no router decides run ahead and only bound the whole. What
`planner.simulate` finds for the same assignment is mostly longer, since buffers and the order of loads count there, and
now and then shorter, where a hand-over hides behind other work.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from offload.tiers import Device, Tier
from planner.placement import Assignment, Option, PlacementProblem


@dataclass(frozen=True, slots=True)
class Stage:
    """Positions of the items that are computed together; `routed` where their loads cannot run ahead."""

    items: tuple[int, ...]
    routed: bool


def stages(problem: PlacementProblem) -> tuple[Stage, ...]:
    """The stages of a step, in order."""
    return tuple(_stages(problem))


def _stages(problem: PlacementProblem) -> Iterator[Stage]:
    group: list[int] = []
    for index, item in enumerate(problem.items):
        if group and not (item.routed and item.layer == problem.items[group[0]].layer):
            yield Stage(tuple(group), True)
            group = []
        if item.routed:
            group.append(index)
        else:
            yield Stage((index,), False)
    if group:
        yield Stage(tuple(group), True)


def flash_seconds(option: Option) -> float:
    """The part of an option's load that reads flash."""
    return max(option.load_s - option.link_s, 0.0) if option.tier is Tier.FLASH else 0.0


def link_seconds(option: Option) -> float:
    """The part of an option's load that goes over the link."""
    return option.link_s if option.tier is Tier.FLASH else option.load_s


def objective_seconds(problem: PlacementProblem, assignment: Assignment) -> float:
    """Seconds of a step: the sum of its stages, or the busy time of a loading lane where that is longer."""
    chosen = problem.chosen(assignment)
    total = 0.0
    before: set[Device] = set()
    for stage in stages(problem):
        options = [chosen[index] for index in stage.items]
        devices = {option.device for option in options}
        lanes = []
        for device in devices:
            compute = sum(option.compute_s for option in options if option.device is device)
            lanes.append(compute + (problem.handover_s if before - {device} else 0.0))
        if stage.routed:
            lanes += [sum(map(flash_seconds, options)), sum(map(link_seconds, options))]
        total += max(lanes)
        before = devices
    return max(total, sum(map(flash_seconds, chosen)), sum(map(link_seconds, chosen)))
