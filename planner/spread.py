"""A model spread over GPU memory, RAM and flash of a machine: the placement problem of a question, and its answers.

What may be placed is every tier and device the machine has, whether or not this version executes it. What does not
depend on placements (libraries, activations, vocabulary, margins) is taken out of the budget first. Knows nothing
about how a problem is solved, nor about plans beyond reading their placements.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from offload.errors import PlanError
from offload.tiers import Device, Tier
from planner.greedy import can_fit
from planner.items import placement_problem
from planner.machine import Machine
from planner.machine_here import machine_here
from planner.memory import memory_needs
from planner.placement import Assignment, PlacementProblem
from planner.plan import KV_DTYPE, Needs, Objective, Placement, Settings, WeightsForm
from planner.question import Question
from planner.ways import PREFILL_CHUNK_TOKENS

SIMULATED = "simulated"  # the loop of what is planned and not executed

CPU_TIERS = frozenset({(Tier.RAM, Device.CPU), (Tier.FLASH, Device.CPU)})
GPU_TIERS = frozenset({(Tier.GPU, Device.GPU), (Tier.RAM, Device.GPU), (Tier.FLASH, Device.GPU)})


@dataclass(frozen=True, slots=True)
class Spread:
    """One way to reserve memory and settings, and the problem that is left; `fixed` is needed whatever is placed."""

    settings: Settings
    fixed: Needs
    problem: PlacementProblem

    @property
    def least_ram_bytes(self) -> int:
        """RAM that is needed when every part is held where it takes least of it."""
        return self.fixed.ram.needed_bytes + sum(min(o.ram_bytes for o in item.options) for item in self.problem.items)

    @property
    def can_fit(self) -> bool:
        """Whether there is any way to hold all parts."""
        return min(self.problem.ram_bytes, self.problem.gpu_bytes) >= 0 and can_fit(self.problem)


def machine_of(question: Question) -> Machine:
    """The machine that a question is about; this one as its profile tells."""
    if isinstance(question.place, Machine):
        return question.place
    return machine_here(question.place.profile, question.budget, Path(question.model.path))


def spreads(question: Question, machine: Machine, context_tokens: int, objective: Objective) -> tuple[Spread, ...]:
    """The problems of a question: without the GPU, and with its parts and what a GPU reserves."""
    return tuple(
        spread_of(question, machine, settings_for(question, machine, context_tokens, device), objective)
        for device in ((Device.CPU, Device.GPU) if machine.gpu is not None else (Device.CPU,))
    )


def settings_for(question: Question, machine: Machine, context_tokens: int, device: Device) -> Settings:
    """What a spread of a model is run with."""
    return Settings(
        context_tokens=context_tokens,
        prefill_chunk_tokens=min(PREFILL_CHUNK_TOKENS, context_tokens),
        threads=question.wish.threads or machine.cpu.threads,
        weights_form=WeightsForm.PACKED,
        kv_dtype=KV_DTYPE,
        loop=SIMULATED,
        device="gpu" if device is Device.GPU else "cpu",
    )


def spread_of(
    question: Question,
    machine: Machine,
    settings: Settings,
    objective: Objective,
    *,
    chunk_tokens: int | None = None,
) -> Spread:
    """The problem under `settings`, whose device says whether the GPU takes part; of another chunk if one is given."""
    device = Device.CPU if settings.device == "cpu" else Device.GPU
    needs = memory_needs(
        question.shape,
        question.budget,
        device,
        WeightsForm.PACKED,
        context_tokens=settings.context_tokens,
        chunk_tokens=settings.prefill_chunk_tokens,
    )
    fixed = Needs(
        ram=replace(needs.ram, weights_bytes=0, kv_bytes=0), gpu=replace(needs.gpu, weights_bytes=0, kv_bytes=0)
    )
    if device is Device.GPU:  # parts computed on the CPU pass their activations on in RAM
        fixed = replace(fixed, ram=replace(fixed.ram, activations_bytes=fixed.gpu.activations_bytes))
    ram_bytes = question.budget.ram_bytes - fixed.ram.needed_bytes  # below 0 where nothing can fit
    problem = placement_problem(
        question.shape,
        machine,
        replace(settings, prefill_chunk_tokens=chunk_tokens or settings.prefill_chunk_tokens),
        objective=objective,
        ram_bytes=ram_bytes,
        gpu_bytes=question.budget.gpu_bytes - fixed.gpu.needed_bytes,
        tiers=CPU_TIERS | GPU_TIERS if device is Device.GPU else CPU_TIERS,
    )
    buffers = fixed.ram.buffers_bytes + ram_bytes - problem.ram_bytes  # what loads from flash arrive in
    fixed = replace(fixed, ram=replace(fixed.ram, buffers_bytes=buffers))
    return Spread(settings, fixed, problem)


def assignment_of(problem: PlacementProblem, placements: Iterable[Placement]) -> Assignment:
    """The options of `problem` that `placements` name; PlanError for a place that the problem does not know.

    An item without a placement of its own name (a class of experts) lies where its unit does.
    """
    placed = {placement.unit: placement for placement in placements}
    chosen: list[int] = []
    for item in problem.items:
        placement = placed.get(item.name) or placed[item.name.partition("#")[0]]
        places = [(option.tier, option.device) for option in item.options]
        chosen.append(_index(places, placement))
    return tuple(chosen)


def _index(places: list[tuple[Tier, Device]], placement: Placement) -> int:
    try:
        return places.index((placement.tier, placement.device))
    except ValueError as error:
        raise PlanError(
            f"{placement.unit} in {placement.tier.value}, computed on {placement.device.value}, is no option here"
        ) from error
