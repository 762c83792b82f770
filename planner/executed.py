"""Plans for this machine, of what this version executes: the ways that fit, each with what it promises, and the best.

Everything in RAM, packed for the CPU's kernels, or that but for experts or layers, and keys and values, that are read
from flash; with a GPU, parts of it there. Knows nothing about machines that are described.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from offload.errors import RequestError
from offload.tiers import Device
from planner import cost
from planner.division import best_division, divides, divisions
from planner.drive import drive_known, streaming_here
from planner.folders import spill_folder
from planner.gpu_choice import EXAMPLE, SIMULATED_PREFIX, is_simulated
from planner.hybrid_fits import fit_hybrids, quickest_in_parts, with_drive_of_experts
from planner.hybrid_flash import FlashExperts, arriving_bytes_per_s
from planner.hybrid_hits import gpu_hit_curve
from planner.hybrid_needs import brought_slots
from planner.hybrid_predict import predict_hybrid
from planner.hybrid_rates import expert_rates
from planner.hybrid_spill import host_notes
from planner.hybrid_split import split_of
from planner.hybrid_step import HybridRun
from planner.kernel_choice import chosen_kernels
from planner.kv import keeps, kv_notes
from planner.kv_spill import Spilling, spill_notes, spilling_here
from planner.memory import GPU_PROCESS_BYTES
from planner.notes import context_notes, way_notes
from planner.plan import FORMAT_VERSION, Needs, Objective, Placement, Plan, PlannedMachine, Settings, WeightsForm
from planner.prediction import Prediction
from planner.profile import with_gpu_rates
from planner.profile_spill import with_spill_rates
from planner.profile_types import with_types
from planner.question import Here, Question
from planner.refusal import refused, too_little_kv_ram
from planner.spread import machine_of
from planner.threads import threads_for
from planner.ways import (
    AUTO,
    DEFAULT_PROMPT_TOKENS,
    HYBRID,
    Fit,
    Way,
    default_context,
    fitting,
    placements,
    ways_for,
)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A way that fits, with the settings it would be run with and what they promise."""

    fit: Fit
    settings: Settings
    predicted: Prediction


def plan_executed(question: Question, here: Here) -> Plan:
    """The best of what this version executes; DoesNotFitError with the nearest that would fit."""
    here = _with_rates(question, here)
    question = replace(question, place=here)
    fits: Sequence[Fit] = _fits(question, here)
    if not fits:
        raise too_little_kv_ram(question) or refused(question)
    here, fits = _divided(question, here, fits)
    candidates = [_candidate(question, here, fit) for fit in fits]
    best = min(candidates, key=lambda candidate: _seconds(candidate.predicted, question.wish.objective))
    gpu = here.gpu if best.fit.way.device is Device.GPU else None
    name, spilling = here.profile.cpu_name, spilling_here(here.profile, best.settings)
    context = best.fit.context_tokens
    return Plan(
        version=FORMAT_VERSION,
        model=question.model,
        machine=PlannedMachine(name, "measured on this machine", here=True, gpu=None if gpu is None else gpu.name),
        objective=question.wish.objective,
        placements=placements(question.shape, best.fit),
        settings=best.settings,
        budget=question.budget,
        needs=best.fit.needs,
        predicted=best.predicted,
        notes=(
            *context_notes(question, context),
            *kv_notes(question.wish.kv, question.shape.block_count, has_gpu=here.gpu is not None),
            *(() if spilling is None else _spill_notes(question, here, best, spilling)),
            *way_notes(question, here, best.fit, others=[fit.way for fit in fits], threads=best.settings.threads),
        ),
    )


def predicted(
    question: Question, here: Here, settings: Settings, needs: Needs, placed: tuple[Placement, ...], prompt_tokens: int
) -> Prediction:
    """What a plan of these settings and placements promises for a prompt of that length."""
    here = _with_rates(question, here)
    typed = with_types(here.profile, question.shape, settings.weights_form)
    if settings.loop == HYBRID:
        run = hybrid_run(replace(question, place=replace(here, profile=typed)), settings, placed)
        return predict_hybrid(
            run,
            typed,
            model=question.model,
            settings=settings,
            needs=needs,
            prompt_tokens=prompt_tokens,
            spilling=spilling_here(here.profile, settings),
        )
    return cost.predict(
        question.shape,
        typed,
        model=question.model,
        settings=settings,
        needs=needs,
        prompt_tokens=prompt_tokens,
        streaming=streaming_here(question.shape, here.profile, question.model, settings),
        spilling=spilling_here(here.profile, settings),
    )


def hybrid_run(question: Question, settings: Settings, placed: tuple[Placement, ...]) -> HybridRun:
    """The steps of a hybrid plan on the machine of the question."""
    split = split_of(question.shape, placed, settings.gpu_slots, settings.gpu_kv_tokens)
    curve = None
    if split.cache_slots(question.shape) and isinstance(question.place, Here):
        curve = gpu_hit_curve(question.shape, question.place.profile, question.model)
    shape, machine = question.shape, machine_of(question)
    rates = expert_rates(shape, machine, settings.threads, streams=settings.stream_slots > 0)
    places = brought_slots(shape, question.budget, split)
    flash = None
    if isinstance(question.place, Here):
        drive = streaming_here(shape, question.place.profile, question.model, settings)
        if drive is not None:
            arriving = arriving_bytes_per_s(shape, drive.flash, settings.threads)
            flash = FlashExperts(settings.stream_slots, drive.curve, arriving)
    return HybridRun(shape, machine, settings.threads, split, curve, rates, places, flash)


def _fits(question: Question, here: Here) -> list[Fit]:
    """All that fit of the ways to be considered; RequestError where only a GPU could do what is asked, without one."""
    loop, shape = question.wish.loop, question.shape
    every = ways_for(loop, shape, has_gpu=_may_use(here, loop))
    ways = tuple(way for way in every if keeps(way.loop, question.wish.kv))
    if question.wish.kv_ram_bytes is not None:
        ways = _spilling(question, ways)
    if not ways:
        raise RequestError(
            f"the {loop} loop needs a GPU, and there is none",
            hint=f"describe one to be simulated: --gpu {EXAMPLE}",
        )
    plain = [way for way in ways if way.loop != HYBRID]
    limits = question.wish.context_tokens, question.wish.kv_ram_bytes
    fits = list(fitting(shape, question.budget, plain, *limits)) if plain else []
    if len(plain) == len(ways):
        return fits
    wanted = question.wish.context_tokens or default_context(shape)
    assert here.gpu is not None, "hybrids are considered where there is a GPU"
    shorter = question.wish.context_tokens is None and not fits
    place = here.gpu.torch_device, threads_for(question, here)
    may_spill = all(fit.kv_ram_bytes is not None for fit in fits)  # what RAM holds alone does not go to flash
    hybrids = fit_hybrids(question, *place, wanted, may_be_shorter=shorter, may_spill=may_spill)

    def seconds(fit: Fit) -> float:
        """In the middle of the context."""
        settings, half = _settings(question, here, fit), max(fit.context_tokens // 2, 1)
        its = predicted(question, here, settings, fit.needs, fit.placements, half)
        return _seconds(its, question.wish.objective)

    return [*quickest_in_parts(hybrids, seconds), *fits]


def _divided(question: Question, here: Here, fits: Sequence[Fit]) -> tuple[Here, Sequence[Fit]]:
    """`fits` with that division of RAM which is predicted to be best where one has something on flash.

    And `here` with what it takes to know that.
    """
    if not any(divides(fit.way) for fit in fits):
        return here, fits
    shape, wish = question.shape, question.wish
    profile = with_types(here.profile, shape, WeightsForm.PACKED)
    here = replace(here, profile=with_spill_rates(drive_known(profile, question.model), spill_folder()))

    def best(fit: Fit) -> Fit:
        others = divisions(shape, question.budget, fit, wish.kv_ram_bytes)
        return best_division(question, here.profile, [fit, *others], lambda one: _settings(question, here, one))

    return here, [best(fit) if divides(fit.way) else fit for fit in fits]


def _spilling(question: Question, ways: tuple[Way, ...]) -> tuple[Way, ...]:
    """Those of the ways that may keep to the RAM that keys and values may take; RequestError where none can.

    How little hybrids can do with depends on what the GPU holds.
    """
    found = tuple(way for way in ways if way.spills)
    if not found:
        raise RequestError(
            f"the {question.wish.loop} loop has all keys and values in memory",
            hint="use --loop program, or leave out --kv-ram",
        )
    error = too_little_kv_ram(question)
    usable = tuple(way for way in found if error is None or way.loop == HYBRID)
    if error is not None and not usable:
        raise error
    return usable


def _may_use(here: Here, loop: str) -> bool:
    """Whether a loop can use the GPU there is: torch alone knows those of other makers, and none that is simulated."""
    if here.gpu is None:
        return False
    if loop in (AUTO, HYBRID):
        return here.gpu.torch_device.startswith(("cuda", SIMULATED_PREFIX))
    return not is_simulated(here.gpu.torch_device)


def _candidate(question: Question, here: Here, fit: Fit) -> _Candidate:
    settings = _settings(question, here, fit)
    prompt = min(question.wish.prompt_tokens or DEFAULT_PROMPT_TOKENS, max(fit.context_tokens - 1, 1))
    return _Candidate(fit, settings, predicted(question, here, settings, fit.needs, fit.placements, prompt))


def _spill_notes(question: Question, here: Here, best: _Candidate, spilling: Spilling) -> Iterable[str]:
    """How a full context is spread, and what is promised for a prompt that leaves room for an answer alone."""
    fit, shape, context = best.fit, question.shape, best.fit.context_tokens
    prompt = max(context - cost.ANSWER_TOKENS, 1)
    full = predicted(question, here, best.settings, fit.needs, fit.placements, prompt)
    if fit.way.loop != HYBRID:
        return spill_notes(shape, context, spilling, full)
    return host_notes(shape, split_of(shape, fit.placements, fit.gpu_slots, fit.gpu_kv_tokens), context, spilling, full)


def _settings(question: Question, here: Here, fit: Fit) -> Settings:
    """What a fit would be run with."""
    gpu = here.gpu if fit.way.device is Device.GPU else None
    typed = with_types(here.profile, question.shape, fit.way.form)
    return Settings(
        context_tokens=fit.context_tokens,
        prefill_chunk_tokens=fit.chunk_tokens,
        threads=threads_for(question, replace(here, gpu=gpu)),
        weights_form=fit.way.form,
        cache_type_k=question.wish.kv.key,
        cache_type_v=question.wish.kv.value,
        kv_budget_tokens=question.wish.kv.budget_tokens,
        loop=fit.way.loop,
        device=gpu.torch_device if gpu is not None else "cpu",
        stream_slots=fit.stream_slots,
        gpu_slots=fit.gpu_slots,
        gpu_kv_tokens=fit.gpu_kv_tokens,
        kv_ram_bytes=fit.kv_ram_bytes,
        tuning=chosen_kernels(typed, question.shape) if fit.way.form is WeightsForm.PACKED else None,
    )


def _with_rates(question: Question, here: Here) -> Here:
    """`here` with the rates of its GPU, and of the model's types and drive where parts are the CPU's."""
    loop = question.wish.loop
    if here.gpu is None or not _may_use(here, loop):
        return here
    profile = here.profile
    if not is_simulated(here.gpu.torch_device):
        if question.budget.gpu_bytes <= GPU_PROCESS_BYTES:
            return here
        profile = with_gpu_rates(profile, here.gpu)
    if loop in (AUTO, HYBRID):
        profile = with_types(profile, question.shape, WeightsForm.PACKED)
        profile = with_drive_of_experts(question, profile)
    return replace(here, profile=profile)


def _seconds(predicted: Prediction, objective: Objective) -> float:
    """What the objective makes small: seconds a token of the answer, until it begins, or a token of it all."""
    token = 1 / predicted.decode_tokens_per_s
    if objective is Objective.LATENCY:
        return token
    if objective is Objective.TTFT:
        return predicted.ttft_s
    return (predicted.ttft_s + cost.ANSWER_TOKENS * token) / (predicted.prompt_tokens + cost.ANSWER_TOKENS)
