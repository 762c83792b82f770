"""Finds a plan: where every unit goes so that all of it fits, or the reason why nothing does.

For this machine, of what this version executes: everything on the GPU if it fits there as float32, or everything in
RAM, packed for the CPU's kernels, or that but for experts or layers that are read from flash; what is predicted to be
better by the objective. For a described machine, every
placement that could be: see `planner.described`. Refuses before anything is loaded. Reads no tensor data.

Invariant: a plan's needs, margins included, are within its budget in every memory.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from cpu_kernels.quant_types import quant_type
from gpu_kernels import capabilities
from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import DoesNotFitError, FlashError
from offload.flash_probe import STREAMING_POINTS
from offload.gguf import GGUFFile
from offload.tiers import Device
from planner import cost
from planner.budget import Budget, measure_budget
from planner.described import plan_described, with_other_tiers
from planner.hit_curve import traced_curve
from planner.kernel_choice import chosen_kernels
from planner.machine import Machine
from planner.machine_here import flash_here
from planner.memory import FLOAT32_BYTES, memory_needs
from planner.model_shape import ModelShape
from planner.notes import context_notes, way_notes
from planner.plan import (
    FORMAT_VERSION,
    KV_DTYPE,
    Objective,
    Plan,
    PlannedMachine,
    PlannedModel,
    Prediction,
    Settings,
    WeightsForm,
)
from planner.profile import (
    Profile,
    load_or_measure,
    with_dequantize_rates,
    with_drive,
    with_gpu_rates,
    with_kernel_rates,
)
from planner.question import Here, Question, Wish, ask
from planner.refusal import refusal
from planner.streamed import Streaming, all_slots, hit_curve, least_slots, streamed_needs
from planner.ways import (
    AUTO,
    DEFAULT_PROMPT_TOKENS,
    LLAMA_CPP,
    MIN_CHUNK_TOKENS,
    SEQUENTIAL,
    Fit,
    default_context,
    fitting,
    longest_context,
    placements,
    ways_for,
)

__all__ = [
    "AUTO",
    "LLAMA_CPP",
    "SEQUENTIAL",
    "for_prompt",
    "make_plan",
    "plan_here",
    "question_here",
    "solve",
    "solve_or_explain",
]

# Below this mean size of a matrix (float32) a second thread costs more than it brings in decode: 2.09 ms a token with
# one, 2.26 ms with two for matrices of 256 x 256 on two cores of an AMD EPYC, and ten times as long on a busy machine.
SHARED_PRODUCT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A way that fits, with the settings it would be run with and what they promise."""

    fit: Fit
    settings: Settings
    predicted: Prediction


def plan_here(
    gguf: GGUFFile,
    *,
    context_tokens: int | None = None,
    threads: int | None = None,
    budget: Budget | None = None,
    loop: str = AUTO,
    prompt_tokens: int | None = None,
    objective: Objective = Objective.LATENCY,
) -> Plan:
    """`make_plan` for this machine as it is now: GPU, profile and, where none is given, the budget are measured."""
    wish = Wish(context_tokens, threads, prompt_tokens, loop, objective)
    return solve_or_explain(question_here(gguf, wish, budget))


def question_here(gguf: GGUFFile, wish: Wish, budget: Budget | None = None) -> Question:
    """What to ask of this machine as it is now."""
    wish.check()
    gpu = capabilities.detect()
    return ask(gguf, budget or measure_budget(gpu), Here(load_or_measure(), gpu), wish)


def make_plan(
    gguf: GGUFFile,
    *,
    budget: Budget,
    profile: Profile | None = None,
    machine: Machine | None = None,
    objective: Objective = Objective.LATENCY,
    context_tokens: int | None = None,
    threads: int | None = None,
    gpu: GpuCapabilities | None = None,
    loop: str = AUTO,
    prompt_tokens: int | None = None,
) -> Plan:
    """The plan for `gguf` within `budget`; `prompt_tokens` is the prompt length that speed is predicted for.

    For this machine by its `profile` and `gpu`, or for a described `machine`. A context of None is chosen: the trained
    one, at most 4096 tokens, less where memory is short. DoesNotFitError with what would fit, UnsupportedModelError for
    a quant type that cannot be computed with.
    """
    if machine is not None:
        place: Here | Machine = machine
    elif profile is not None:
        place = Here(profile, gpu)
    else:
        raise ValueError("a plan is for this machine, by its profile, or for a described machine")
    return solve(ask(gguf, budget, place, Wish(context_tokens, threads, prompt_tokens, loop, objective)))


def solve(question: Question) -> Plan:
    """The plan that answers a question; DoesNotFitError naming the nearest thing that fits."""
    if isinstance(question.place, Machine):
        plan = plan_described(question, question.place)
    else:
        plan = _plan_here(question, question.place)
    plan.check()
    return plan


def solve_or_explain(question: Question) -> Plan:
    """`solve`, with a refusal that also says what other tiers of this machine would do, if it takes a moment longer."""
    try:
        return solve(question)
    except DoesNotFitError as error:
        if isinstance(question.place, Machine):
            raise

        raise with_other_tiers(error, question) from error


def for_prompt(plan: Plan, gguf: GGUFFile, prompt_tokens: int) -> Plan:
    """`plan` with its speed predicted for a prompt of `prompt_tokens`, from the profile as it is now."""
    shape = ModelShape.from_gguf(gguf)
    profile = _with_types(load_or_measure(), shape, plan.settings.weights_form)
    prompt = min(max(prompt_tokens, 1), plan.settings.context_tokens)
    predicted = cost.predict(
        *(shape, profile),
        model=plan.model,
        settings=plan.settings,
        needs=plan.needs,
        prompt_tokens=prompt,
        streaming=_streaming(shape, profile, plan.model, plan.settings),
    )
    return replace(plan, predicted=predicted)


def _plan_here(question: Question, here: Here) -> Plan:
    """The best of what this version executes."""
    ways = ways_for(question.wish.loop, question.shape, has_gpu=here.gpu is not None)
    fits = fitting(question.shape, question.budget, ways, question.wish.context_tokens)
    if not fits:
        raise _refusal(question)
    candidates = [_candidate(question, here, fit) for fit in fits]
    best = min(candidates, key=lambda candidate: _seconds(candidate.predicted, question.wish.objective))
    return Plan(
        version=FORMAT_VERSION,
        model=question.model,
        machine=PlannedMachine(here.profile.cpu_name, "measured on this machine", here=True),
        objective=question.wish.objective,
        placements=placements(question.shape, best.fit),
        settings=best.settings,
        budget=question.budget,
        needs=best.fit.needs,
        predicted=best.predicted,
        notes=(
            *context_notes(question, best.fit.context_tokens),
            *way_notes(question, here, best.fit, gpu_fits=len(fits) > 1, threads=best.settings.threads),
        ),
    )


def _candidate(question: Question, here: Here, fit: Fit) -> _Candidate:
    profile, gpu = here.profile, here.gpu if fit.way.device is Device.GPU else None
    if gpu is not None:
        profile = with_gpu_rates(profile, gpu)
    typed = _with_types(profile, question.shape, fit.way.form)
    settings = Settings(
        context_tokens=fit.context_tokens,
        prefill_chunk_tokens=fit.chunk_tokens,
        threads=question.wish.threads or _threads(question.shape, profile),
        weights_form=fit.way.form,
        kv_dtype=KV_DTYPE,
        loop=fit.way.loop,
        device=gpu.torch_device if gpu is not None else "cpu",
        stream_slots=fit.stream_slots,
        tuning=chosen_kernels(typed, question.shape) if fit.way.form is WeightsForm.PACKED else None,
    )
    predicted = cost.predict(
        question.shape,
        typed,
        model=question.model,
        settings=settings,
        needs=fit.needs,
        prompt_tokens=min(question.wish.prompt_tokens or DEFAULT_PROMPT_TOKENS, max(fit.context_tokens - 1, 1)),
        streaming=_streaming(question.shape, profile, question.model, settings),
    )
    return _Candidate(fit, settings, predicted)


def _streaming(shape: ModelShape, profile: Profile, model: PlannedModel, settings: Settings) -> Streaming | None:
    """Where experts come from and how often, if they are streamed; the drive is measured where it is not known."""
    if not settings.stream_slots:
        return None
    path = Path(model.path)
    try:
        flash = flash_here(with_drive(profile, path, points=STREAMING_POINTS), path)
    except OSError as error:
        raise FlashError(f"the drive of {model.path} cannot be measured: {error}") from error
    assert flash is not None, "the drive was measured"
    points = profile.hits.get(model.key)
    return Streaming(flash, hit_curve(shape, None if points is None else traced_curve(points, all_slots(shape))))


def _with_types(profile: Profile, shape: ModelShape, form: WeightsForm) -> Profile:
    """`profile` with what the form of the weights needs to be known of their types."""
    kinds = {quant_type(name) for name, _ in shape.weights_by_type}
    if form is WeightsForm.QUANTISED:
        return with_dequantize_rates(profile, kinds)
    return with_kernel_rates(profile, kinds) if form is WeightsForm.PACKED else profile


def _seconds(predicted: Prediction, objective: Objective) -> float:
    """What the objective makes small: seconds a token of the answer, until it begins, or a token of it all."""
    token = 1 / predicted.decode_tokens_per_s
    if objective is Objective.LATENCY:
        return token
    if objective is Objective.TTFT:
        return predicted.ttft_s
    return (predicted.ttft_s + cost.ANSWER_TOKENS * token) / (predicted.prompt_tokens + cost.ANSWER_TOKENS)


def _refusal(question: Question) -> DoesNotFitError:
    """Why nothing that this version executes fits, with the nearest that does."""
    way = ways_for(question.wish.loop, question.shape, has_gpu=False)[-1]
    wanted = question.wish.context_tokens or default_context(question.shape)
    if way.streams:
        slots = least_slots(question.shape, 1)
        smallest = streamed_needs(question.shape, question.budget, context_tokens=wanted, chunk_tokens=1, slots=slots)
    else:
        chunk = min(MIN_CHUNK_TOKENS, wanted)
        options = {"context_tokens": wanted, "chunk_tokens": chunk}
        smallest = memory_needs(question.shape, question.budget, way.device, way.form, **options)
    shorter = longest_context(question.shape, question.budget, way, wanted)
    return refusal(
        question.model.path,
        question.shape,
        question.budget,
        smallest.ram,
        context_tokens=wanted,
        fitting_context_tokens=shorter.context_tokens if shorter is not None else None,
    )


def _threads(shape: ModelShape, profile: Profile) -> int:
    """One thread for products too small to share out, else all there are."""
    products = max(shape.num_matmuls_per_token, 1)
    return profile.threads if FLOAT32_BYTES * shape.active_weights / products >= SHARED_PRODUCT_BYTES else 1
