"""Plans for a described machine, over every tier and device it has: planned and simulated, not executed here.

The best assignment of a placement problem becomes a plan; speeds are those of the simulated steps. The same search
says what a refused model would do on other tiers of this machine. Knows nothing about how problems are solved.

Invariant: needs are within the budget in every memory.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from offload.errors import DoesNotFitError
from offload.tiers import Device, Tier
from planner.binding import bottleneck
from planner.machine import Machine
from planner.model_shape import UnitKind
from planner.notes import context_notes
from planner.placement import Assignment, Option
from planner.plan import FORMAT_VERSION, MemoryNeeds, Needs, Objective, Placement, Plan, PlannedMachine
from planner.prediction import Prediction, Residual
from planner.question import Question
from planner.refusal import refusal
from planner.schedule import schedule
from planner.simulate import simulate, step_seconds
from planner.solvers import best_assignment
from planner.spread import Spread, assignment_of, machine_of, spread_of, spreads
from planner.ways import DEFAULT_PROMPT_TOKENS, HYBRID, default_context

LEAST_CONTEXT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _Answer:
    """A spread with the assignment found for it, and how long its step takes."""

    spread: Spread
    assignment: Assignment
    seconds: float


def plan_described(question: Question, machine: Machine) -> Plan:
    """The best plan for `machine`; a context of None is halved until one fits. DoesNotFitError with the nearest."""
    wanted = question.wish.context_tokens or default_context(question.shape)
    fitting, found_spreads = _longest(question, machine, wanted, question.wish.objective)
    if fitting is None or (fitting < wanted and question.wish.context_tokens is not None):
        raise _refusal(question, machine, wanted, fitting)
    found = _best(found_spreads)
    return _plan(question, machine, found)


def with_other_tiers(error: DoesNotFitError, question: Question) -> DoesNotFitError:
    """`error`, saying how fast the model would be on tiers of this machine that are not executed yet, where it fits."""
    context = question.wish.context_tokens or default_context(question.shape)
    machine = machine_of(question)
    longest, found_spreads = _longest(question, machine, context, Objective.LATENCY)
    if longest != context or question.wish.loop == HYBRID:
        return error
    found = _best(found_spreads)
    tiers = {option.tier for option in found.spread.problem.chosen(found.assignment)}
    where = " and ".join(name for tier, name in ((Tier.GPU, "the GPU"), (Tier.FLASH, "flash")) if tier in tiers)
    return DoesNotFitError(
        str(error),
        needed_bytes=error.needed_bytes,
        available_bytes=error.available_bytes,
        hint=f"{error.hint}; with parts on {where} it would fit, at about {1 / found.seconds:.2g} tokens/s, "
        "which this version plans and simulates, but does not execute yet",
    )


def _longest(
    question: Question, machine: Machine, wanted: int, objective: Objective
) -> tuple[int | None, tuple[Spread, ...]]:
    """The longest of `wanted` tokens, half, a quarter and so on that can fit, with the problems that can."""
    context = wanted
    while True:
        found = tuple(spread for spread in spreads(question, machine, context, objective) if spread.can_fit)
        if found:
            return context, found
        if context // 2 < LEAST_CONTEXT_TOKENS:
            return None, ()
        context //= 2


def _best(fitting: Sequence[Spread]) -> _Answer:
    """The quickest answer to the problems, each of which can fit."""
    solutions = [(spread, best_assignment(spread.problem)) for spread in fitting]
    answers = [_Answer(spread, found.assignment, found.seconds) for spread, found in solutions if found is not None]
    return min(answers, key=lambda answer: answer.seconds)


def _plan(question: Question, machine: Machine, found: _Answer) -> Plan:
    placements = tuple(_placements(question, found))
    needs = _needs(found)
    return Plan(
        version=FORMAT_VERSION,
        model=question.model,
        machine=PlannedMachine(machine.name, machine.source, here=False),
        objective=question.wish.objective,
        placements=placements,
        settings=found.spread.settings,
        budget=question.budget,
        needs=needs,
        predicted=_predict(question, machine, found.spread, placements, needs),
        notes=tuple(_notes(question, found)),
    )


def _placements(question: Question, found: _Answer) -> Iterator[Placement]:
    """Every item where its option holds it, with the bytes it takes there."""
    problem = found.spread.problem
    classes = Counter(item.name.partition("#")[0] for item in problem.items)
    file_bytes = {unit.name: unit.num_bytes for unit in question.shape.units}
    for item, option in zip(problem.items, problem.chosen(found.assignment), strict=True):
        unit = item.name.partition("#")[0]
        held = {Tier.RAM: option.ram_bytes, Tier.GPU: option.gpu_bytes}
        whole = file_bytes.get(unit, 0) // classes[unit]
        if item.kind is UnitKind.KV and item.layer is not None:
            whole = question.shape.kv_bytes_per_layer[item.layer] * found.spread.settings.context_tokens
        num_bytes = held.get(option.tier, whole)
        yield Placement(item.name, item.kind, item.layer, num_bytes, option.tier, option.device)


def _needs(found: _Answer) -> Needs:
    """What is needed whatever is placed, and what the options hold."""
    fixed, problem = found.spread.fixed, found.spread.problem
    chosen = list(zip(problem.items, problem.chosen(found.assignment), strict=True))

    def held(memory: MemoryNeeds, bytes_of: Callable[[Option], int]) -> MemoryNeeds:
        kv = sum(bytes_of(option) for item, option in chosen if item.kind is UnitKind.KV)
        return replace(memory, weights_bytes=sum(bytes_of(option) for _, option in chosen) - kv, kv_bytes=kv)

    return Needs(
        ram=held(fixed.ram, lambda option: option.ram_bytes), gpu=held(fixed.gpu, lambda option: option.gpu_bytes)
    )


def _predict(
    question: Question, machine: Machine, spread: Spread, placements: Sequence[Placement], needs: Needs
) -> Prediction:
    """The speeds of the simulated steps: of one token of the answer, and of the chunks of the prompt."""
    settings = spread.settings
    decode = spread_of(question, machine, settings, Objective.LATENCY).problem
    assignment = assignment_of(decode, placements)
    timeline = simulate(schedule(decode, assignment))
    prompt = min(question.wish.prompt_tokens or DEFAULT_PROMPT_TOKENS, max(settings.context_tokens - 1, 1))
    whole, rest = divmod(prompt, settings.prefill_chunk_tokens)
    ttft_s = 0.0
    for count, tokens in ((whole, settings.prefill_chunk_tokens), (bool(rest), rest)):
        if count:
            prefill = spread_of(question, machine, settings, Objective.TTFT, chunk_tokens=tokens).problem
            ttft_s += count * step_seconds(prefill, assignment_of(prefill, placements))
    return Prediction(
        decode_tokens_per_s=1 / timeline.seconds,
        prefill_tokens_per_s=prompt / ttft_s,
        ttft_s=ttft_s,
        peak_ram_bytes=needs.ram.peak_bytes,
        peak_gpu_bytes=needs.gpu.peak_bytes,
        bottleneck=bottleneck(decode, assignment, timeline),
        prompt_tokens=prompt,
        decode_correction=Residual(1.0, 0),
        prefill_correction=Residual(1.0, 0),
    )


def _notes(question: Question, found: _Answer) -> Iterator[str]:
    yield from context_notes(question, found.spread.settings.context_tokens)
    chosen = found.spread.problem.chosen(found.assignment)
    on_flash = any(option.tier is Tier.FLASH for option in chosen)
    on_gpu = any(option.device is Device.GPU for option in chosen)
    parts = [name for name, here in (("on flash", on_flash), ("on the GPU", on_gpu)) if here]
    otherwise = f"; a run would choose parts {' and '.join(parts)} by its own rules" if parts else ""
    yield f"for a described machine: planned and simulated, not run{otherwise}"


def _refusal(question: Question, machine: Machine, wanted: int, fitting: int | None) -> DoesNotFitError:
    spread = spreads(question, machine, wanted, Objective.LATENCY)[0]
    return refusal(
        question.model.path,
        question.shape,
        question.budget,
        replace(spread.fixed.ram, weights_bytes=spread.least_ram_bytes - spread.fixed.ram.needed_bytes),
        context_tokens=wanted,
        fitting_context_tokens=fitting,
    )
