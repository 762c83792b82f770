"""What another machine, type or context would change, found by planning again.

Knows nothing about how plans are found: each alternative is a question with one thing changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload.errors import DoesNotFitError, RequestError
from planner.budget import GIB, format_size
from planner.machine import Machine
from planner.plan import Plan
from planner.question import Question
from planner.refusal import COMMON_TYPES
from planner.solve import solve

MORE_BYTES = 2 * GIB
WORTH_SAYING = 1.05  # times as fast: less is within what predictions are off by


@dataclass(frozen=True, slots=True)
class Alternative:
    """One thing changed, and what is predicted then; speeds are None where nothing fits."""

    change: str
    decode_tokens_per_s: float | None
    ttft_s: float | None
    peak_ram_bytes: int | None


def what_if(question: Question, plan: Plan) -> tuple[Alternative, ...]:
    """Alternatives to `plan`, the answer to `question`, that are possible at all."""
    fixed = _with_wish(question, context_tokens=plan.settings.context_tokens)
    changes = [*_resources(fixed), *_threads(fixed, plan), *_types(fixed), *_contexts(fixed, plan)]
    return tuple(_alternative(plan, *change) for change in changes)


def best_help(question: Question, plan: Plan) -> Alternative | None:
    """The resource of which more would help most, if any makes decode faster by 5% or more."""
    fixed = _with_wish(question, context_tokens=plan.settings.context_tokens)
    changes = [*_resources(fixed), *(_threads(fixed, plan) if question.wish.threads is not None else ())]
    alternatives = [_alternative(plan, *change) for change in changes]
    fastest = max(alternatives, key=lambda alternative: alternative.decode_tokens_per_s or 0.0, default=None)
    least = WORTH_SAYING * plan.predicted.decode_tokens_per_s
    return fastest if fastest is not None and (fastest.decode_tokens_per_s or 0.0) >= least else None


def as_type(question: Question, name: str) -> Question:
    """The same model with its weights in a common type, their bytes scaled to its bits a weight."""
    scale = COMMON_TYPES[name] / question.bits_per_weight
    shape, tensor_type = question.shape, name.removesuffix("_M")
    units = tuple(
        replace(
            unit,
            num_bytes=round(scale * unit.num_bytes),
            active_bytes=round(scale * unit.active_bytes),
            active_bytes_by_type=((tensor_type, round(scale * unit.active_bytes)),),
        )
        for unit in shape.units
    )
    weights = ((tensor_type, sum(number for _, number in shape.weights_by_type)),)
    return replace(question, shape=replace(shape, units=units, weights_by_type=weights))


def _alternative(plan: Plan, change: str, question: Question) -> Alternative:
    """What is predicted for `question`, corrected as `plan` is where both run the same way: only so do they compare."""
    try:
        other = solve(question)
    except (DoesNotFitError, RequestError):  # the latter where --kv-ram is too little for a longer context
        return Alternative(change, None, None, None)
    now, then = plan.predicted, other.predicted
    decode = prefill = 1.0
    if (plan.settings.loop, plan.settings.device) == (other.settings.loop, other.settings.device):
        decode = now.decode_correction.factor / then.decode_correction.factor
        prefill = now.prefill_correction.factor / then.prefill_correction.factor
    return Alternative(change, then.decode_tokens_per_s / decode, then.ttft_s * prefill, then.peak_ram_bytes)


def _resources(question: Question) -> Iterator[tuple[str, Question]]:
    """More memory of each kind there is."""
    more, budget, place = format_size(MORE_BYTES), question.budget, question.place
    larger = replace(budget, ram_bytes=budget.ram_bytes + MORE_BYTES)
    machine = replace(place, ram_bytes=place.ram_bytes + MORE_BYTES) if isinstance(place, Machine) else place
    yield f"{more} more RAM", replace(question, budget=larger, place=machine)
    if place.gpu is None:
        return
    larger = replace(budget, gpu_bytes=budget.gpu_bytes + MORE_BYTES)
    if isinstance(place, Machine):
        gpu = replace(place.gpu, memory_bytes=place.gpu.memory_bytes + MORE_BYTES)
        place = replace(place, gpu=gpu)
    yield f"{more} more GPU memory", replace(question, budget=larger, place=place)


def _threads(question: Question, plan: Plan) -> Iterator[tuple[str, Question]]:
    """One thread less, and one more where the user asks for fewer than the planner would take."""
    now = plan.settings.threads
    counts = [now - 1] if now > 1 else []
    if question.wish.threads is not None:
        own = solve(replace(question, wish=replace(question.wish, threads=None))).settings.threads
        counts += [now + 1] if now < own else []
    for threads in counts:
        yield f"{threads} threads" if threads > 1 else "1 thread", _with_wish(question, threads=threads)


def _types(question: Question) -> Iterator[tuple[str, Question]]:
    """The common types next to the file's own, above and below."""
    now = question.bits_per_weight
    larger = [name for name, bits in COMMON_TYPES.items() if bits > 1.05 * now]
    smaller = [name for name, bits in COMMON_TYPES.items() if bits < 0.95 * now]
    for name in (*larger[-1:], *smaller[:1]):
        yield f"as {name}", as_type(question, name)


def _contexts(question: Question, plan: Plan) -> Iterator[tuple[str, Question]]:
    """Half the context, and twice as much where the model was trained on it."""
    now = plan.settings.context_tokens
    for tokens in (now // 2, 2 * now):
        if 1 <= tokens <= max(question.shape.context_length, now):
            yield f"context of {tokens} tokens", _with_wish(question, context_tokens=tokens)


def _with_wish(question: Question, *, context_tokens: int | None = None, threads: int | None = None) -> Question:
    wish = question.wish
    changed = replace(wish, context_tokens=context_tokens or wish.context_tokens, threads=threads or wish.threads)
    return replace(question, wish=changed)
