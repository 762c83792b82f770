"""Why a unit lies where it does: every option it had, with its time and bytes, and what speaks against it.

Each option is put in the place of the one taken, everything else staying, and the step is simulated again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload.errors import RequestError
from offload.tiers import Device, Tier
from planner.budget import format_size
from planner.figures import duration
from planner.hybrid import hybrid_choice
from planner.hybrid_parts import part_of
from planner.placement import Assignment, PlacementProblem
from planner.plan import Objective, Plan, WeightsForm
from planner.question import Question
from planner.simulate import step_seconds
from planner.spread import assignment_of, machine_of, spread_of
from planner.ways import HYBRID


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of a unit, for one step of decode."""

    unit: str
    tier: Tier
    device: Device
    compute_s: float
    load_s: float
    ram_bytes: int
    gpu_bytes: int
    taken: bool
    reason: str


def why(question: Question, plan: Plan, unit: str) -> tuple[Choice, ...]:
    """The options of `unit`, or of all classes of its experts; RequestError for a unit that the model does not have.

    In a hybrid plan units that go together are one: the KV cache of a layer with its attention, say.
    """
    problem, assignment = decode_step(question, plan)
    names = [item.name for item in problem.items]
    name = part_of(question.shape, unit) if plan.settings.loop == HYBRID else unit
    positions = [index for index, each in enumerate(names) if name in (each, each.partition("#")[0])]
    if not positions:
        examples = [name for item, name in zip(problem.items, names, strict=True) if item.layer in (None, 0)]
        raise RequestError(f"the model has no unit {unit!r}", hint=f"its units are {', '.join(examples)} and so on")
    return tuple(choice for index in positions for choice in _choices(plan, problem, assignment, index))


def decode_step(question: Question, plan: Plan) -> tuple[PlacementProblem, Assignment]:
    """The problem of one token's step under the settings of `plan`, and its answer: with all that the machine has, or,
    of a hybrid, with all that this version executes.
    """
    machine = machine_of(question)
    if plan.settings.loop == HYBRID:
        return hybrid_choice(question, machine, plan)
    settings = replace(plan.settings, device="cpu" if machine.gpu is None else "gpu", weights_form=WeightsForm.PACKED)
    problem = spread_of(question, machine, settings, Objective.LATENCY).problem
    return problem, assignment_of(problem, plan.placements)


def _choices(plan: Plan, problem: PlacementProblem, assignment: Assignment, index: int) -> Iterator[Choice]:
    item = problem.items[index]
    for number, option in enumerate(item.options):
        taken = number == assignment[index]
        changed = (*assignment[:index], number, *assignment[index + 1 :])
        yield Choice(
            unit=item.name,
            tier=option.tier,
            device=option.device,
            compute_s=option.compute_s,
            load_s=option.load_s,
            ram_bytes=option.ram_bytes,
            gpu_bytes=option.gpu_bytes,
            taken=taken,
            reason="taken" if taken else _against(plan, problem, assignment, changed),
        )


def _against(plan: Plan, problem: PlacementProblem, assignment: Assignment, changed: Assignment) -> str:
    """What speaks against a changed assignment."""
    held = zip(("RAM", "GPU memory"), problem.held_bytes(assignment), problem.held_bytes(changed), strict=True)
    for (name, before, after), room in zip(held, (problem.ram_bytes, problem.gpu_bytes), strict=True):
        if after > max(room, before):
            return f"{format_size(after - max(room, before))} too much for the {name}"
    later = step_seconds(problem, changed) - step_seconds(problem, assignment)
    if later > 0:
        return f"a token would take {duration(later)} longer"
    if plan.machine.here and plan.settings.loop != HYBRID:
        return f"a token would take {duration(-later)} less, but this version does not execute it yet"
    return "no quicker" if later == 0 else f"a token would take {duration(-later)} less, but other steps longer"
