"""A model spread over GPU memory, RAM and flash of a machine: the placement problem of a question, and its answers.

What may be placed is every tier and device the machine has, whether or not this version executes it. What does not
depend on placements (libraries, activations, vocabulary, margins) is taken out of the budget first. Knows nothing
about how a problem is solved, nor about plans beyond reading their placements.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from offload.errors import PlanError
from offload.tiers import Device, Tier
from planner.gpu_choice import gpu_rates
from planner.greedy import can_fit
from planner.items import placement_problem
from planner.machine import Machine
from planner.machine_here import machine_here
from planner.memory import memory_needs
from planner.placement import Assignment, Item, Option, PlacementProblem
from planner.plan import Needs, Objective, Placement, Settings, WeightsForm
from planner.question import Question
from planner.stages import link_seconds
from planner.ways import PREFILL_CHUNK_TOKENS

SIMULATED = "simulated"  # the loop of what is planned and not executed

CPU_TIERS = frozenset({(Tier.RAM, Device.CPU), (Tier.FLASH, Device.CPU)})
GPU_TIERS = frozenset({(Tier.GPU, Device.GPU)})
GPU_LOADS = frozenset({(Tier.RAM, Device.GPU), (Tier.FLASH, Device.GPU)})


class GpuLoads(Enum):
    """What a GPU may compute that does not lie there: nothing, experts that routers choose, or dense parts too."""

    NONE = "none"
    ROUTED = "routed"
    ALL = "all"


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
    here, budget = question.place, question.budget
    machine = machine_here(here.profile, budget, Path(question.model.path))
    return replace(machine, gpu=None if here.gpu is None else gpu_rates(here.gpu, here.profile, budget.gpu_bytes))


def spreads(question: Question, machine: Machine, context_tokens: int, objective: Objective) -> tuple[Spread, ...]:
    """The problems of a question: without the GPU; with its parts and what a GPU reserves; and with buffers on it, for
    what is loaded step by step.
    """
    alone = spread_of(question, machine, settings_for(question, machine, context_tokens, Device.CPU), objective)
    if machine.gpu is None:
        return (alone,)
    settings = settings_for(question, machine, context_tokens, Device.GPU)
    still = spread_of(question, machine, settings, objective, loads=GpuLoads.NONE)
    routed = spread_of(question, machine, settings, objective, loads=GpuLoads.ROUTED)
    every = spread_of(question, machine, settings, objective)
    problem = _worth_loading(every.problem)
    found = [alone, still]
    if question.shape.expert_count:
        found.append(routed)
    if any(_is_load(option) for item in problem.items if not item.routed for option in item.options):
        found.append(replace(every, problem=problem))
    return tuple(found)


def settings_for(question: Question, machine: Machine, context_tokens: int, device: Device) -> Settings:
    """What a spread of a model is run with."""
    return Settings(
        context_tokens=context_tokens,
        prefill_chunk_tokens=min(PREFILL_CHUNK_TOKENS, context_tokens),
        threads=question.wish.threads or machine.cpu.threads,
        weights_form=WeightsForm.PACKED,
        cache_type_k=question.wish.kv.key,
        cache_type_v=question.wish.kv.value,
        kv_budget_tokens=question.wish.kv.budget_tokens,
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
    loads: GpuLoads = GpuLoads.ALL,
) -> Spread:
    """The problem under `settings`, whose device says whether the GPU takes part; of another chunk if one is given.

    `loads`: what the GPU may compute that does not lie there, and has buffers for.
    """
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
    gpu_bytes = question.budget.gpu_bytes - fixed.gpu.needed_bytes
    problem = placement_problem(
        question.shape,
        machine,
        replace(settings, prefill_chunk_tokens=chunk_tokens or settings.prefill_chunk_tokens),
        objective=objective,
        ram_bytes=ram_bytes,
        gpu_bytes=gpu_bytes,
        tiers=_places(device, loads),
        loads_dense=loads is GpuLoads.ALL,
    )
    buffers = fixed.ram.buffers_bytes + ram_bytes - problem.ram_bytes  # what loads from flash arrive in
    gpu_buffers = fixed.gpu.buffers_bytes + gpu_bytes - problem.gpu_bytes
    fixed = Needs(replace(fixed.ram, buffers_bytes=buffers), replace(fixed.gpu, buffers_bytes=gpu_buffers))
    return Spread(settings, fixed, problem)


def _places(device: Device, loads: GpuLoads) -> frozenset[tuple[Tier, Device]]:
    if device is Device.CPU:
        return CPU_TIERS
    return CPU_TIERS | GPU_TIERS | (frozenset() if loads is GpuLoads.NONE else GPU_LOADS)


def _worth_loading(problem: PlacementProblem) -> PlacementProblem:
    """The problem without dense parts that the GPU would compute later than the CPU could have done it.

    A load that a router decides may run beside the CPU's share of the same layer. One of dense weights crosses the link
    from the same RAM that the CPU reads at the same time, so that nothing is gained unless the link brings them before
    the CPU has computed them: in long steps alone, of prompts and of many sequences.
    """
    return replace(problem, items=tuple(item if item.routed else _without_slow_loads(item) for item in problem.items))


def _without_slow_loads(item: Item) -> Item:
    on_cpu = {option.tier: option.compute_s for option in item.options if option.device is Device.CPU}
    kept = (
        option
        for option in item.options
        if not _is_load(option) or link_seconds(option) < on_cpu.get(option.tier, math.inf)
    )
    return replace(item, options=tuple(kept))


def _is_load(option: Option) -> bool:
    return option.device is Device.GPU and option.tier is not Tier.GPU


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
