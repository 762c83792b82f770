"""Says why a model does not fit: what is needed and what for, what there is, and the nearest thing that does fit.

Knows nothing about how plans are searched.
"""

from offload.errors import DoesNotFitError, RequestError
from planner.budget import MIB, Budget, format_size
from planner.kv_spill import least_kv_ram_bytes
from planner.memory import memory_needs
from planner.model_shape import ModelShape
from planner.plan import MemoryNeeds
from planner.question import Question
from planner.streamed import least_slots, streamed_needs
from planner.ways import HYBRID, MIN_CHUNK_TOKENS, default_context, longest_context, ways_for

# Common types with their bits a weight in whole models, as llama.cpp's table of its quantisations gives them for an
# 8B Llama, rounded up; larger first.
COMMON_TYPES = {"Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 4.0, "Q2_K": 3.2}


def refused(question: Question) -> DoesNotFitError:
    """Why nothing that this version executes fits, with the nearest that does."""
    if question.wish.loop == HYBRID:
        return DoesNotFitError(
            f"no part of {question.model.path} fits {format_size(question.budget.gpu_bytes)} of GPU memory "
            f"({question.budget.gpu_source}) beside what a prompt needs, with the rest in "
            f"{format_size(question.budget.ram_bytes)} of RAM",
            needed_bytes=0,
            available_bytes=question.budget.gpu_bytes,
            hint="give it more of both, a shorter context (-c), or leave out --loop hybrid",
        )
    ways = ways_for(question.wish.loop, question.shape, has_gpu=False)
    way = ways[-1]
    wanted = question.wish.context_tokens or default_context(question.shape)
    if way.streams:
        held = {"context_tokens": wanted, "chunk_tokens": 1, "slots": least_slots(question.shape, 1)}
        kept = min(least_kv_ram_bytes(question.shape, wanted), question.shape.kv_bytes_per_token * wanted)
        smallest = streamed_needs(question.shape, question.budget, **held, kv_ram_bytes=kept)
    else:
        chunk = min(MIN_CHUNK_TOKENS, wanted)
        options = {"context_tokens": wanted, "chunk_tokens": chunk}
        smallest = memory_needs(question.shape, question.budget, way.device, way.form, **options)
    shorter = longest_context(question.shape, question.budget, ways, wanted)
    return refusal(
        question.model.path,
        question.shape,
        question.budget,
        smallest.ram,
        context_tokens=wanted,
        fitting_context_tokens=shorter.context_tokens if shorter is not None else None,
    )


def too_little_kv_ram(question: Question) -> RequestError | None:
    """Why no CPU keeps to the RAM that keys and values may take; None where one does."""
    wish, shape = question.wish, question.shape
    context = wish.context_tokens or default_context(shape)
    least = least_kv_ram_bytes(shape, context)
    if wish.kv_ram_bytes is None or wish.kv_ram_bytes >= least:
        return None
    return RequestError(
        f"--kv-ram {format_size(wish.kv_ram_bytes)} is too little for {context} tokens of context",
        hint=f"{format_size(least)} would do, or a shorter context (-c)",
    )


def refusal(
    path: str,
    shape: ModelShape,
    budget: Budget,
    needs: MemoryNeeds,
    *,
    context_tokens: int,
    fitting_context_tokens: int | None,
) -> DoesNotFitError:
    """The error for a model whose smallest `needs` of RAM, at `context_tokens`, are beyond `budget`.

    `fitting_context_tokens` is the longest context that would fit, None where no context does.
    """
    needed = format_size(needs.needed_bytes)
    would_do = f"{needed} of RAM would do"
    if budget.ram_source == "--budget":
        would_do += f": --budget ram={-(-needs.needed_bytes // MIB)}MiB"
    if fitting_context_tokens is not None:
        hint = f"a context of {fitting_context_tokens} tokens fits: -c {fitting_context_tokens}"
        if budget.ram_source == "--budget":
            hint = f"{would_do}; {hint}"
    else:
        hint = would_do
        if smaller := smaller_type(shape, needs, budget.ram_bytes):
            hint += f", or this model as {smaller} or smaller"
    return DoesNotFitError(
        f"{path} with {context_tokens} tokens of context needs {needed} of RAM, "
        f"{format_size(budget.ram_bytes)} may be used ({budget.ram_source}): {_breakdown(needs)}",
        needed_bytes=needs.needed_bytes,
        available_bytes=budget.ram_bytes,
        hint=hint,
    )


def smaller_type(shape: ModelShape, needs: MemoryNeeds, available_bytes: int) -> str | None:
    """The largest common quant type, smaller than the file's mix, in which the weights would fit; None without one."""
    room = available_bytes - (needs.needed_bytes - needs.weights_bytes)
    now = 8 * shape.num_bytes / max(shape.num_parameters, 1)
    fitting = (name for name, bits in COMMON_TYPES.items() if bits < now and shape.num_parameters * bits / 8 <= room)
    return next(fitting, None)


def _breakdown(needs: MemoryNeeds) -> str:
    parts = (
        ("weights", needs.weights_bytes),
        ("slots", needs.slots_bytes),
        ("KV cache", needs.kv_bytes),
        ("activations", needs.activations_bytes),
        ("buffers", needs.buffers_bytes),
        ("vocabulary", needs.vocabulary_bytes),
        ("libraries", needs.process_bytes),
        ("margin", needs.margin_bytes),
    )
    return ", ".join(f"{name} {format_size(num_bytes)}" for name, num_bytes in parts if num_bytes)
