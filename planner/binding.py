"""What binds a simulated step: the resource that takes most of its critical path.

Knows nothing about machines or models.
"""

from planner.placement import Assignment, PlacementProblem
from planner.prediction import Bottleneck
from planner.schedule import Lane
from planner.simulate import Timeline

_LANES = {Lane.LINK: Bottleneck.LINK, Lane.FLASH: Bottleneck.FLASH}


def bottleneck(problem: PlacementProblem, assignment: Assignment, timeline: Timeline) -> Bottleneck:
    """A loading lane, or what the items computed on the critical path are bound by; to hand over is overhead."""
    bound_by = {
        item.name: option.bound_by for item, option in zip(problem.items, problem.chosen(assignment), strict=True)
    }
    seconds = dict.fromkeys(Bottleneck, 0.0)
    for index in timeline.critical_path():
        task = timeline.tasks[index]
        computing = bound_by.get(task.name, Bottleneck.OVERHEAD)  # what else devices do is to hand over
        seconds[_LANES.get(task.lane, computing)] += task.seconds
    return max(Bottleneck, key=lambda each: seconds[each])
