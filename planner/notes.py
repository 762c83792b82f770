"""What a user should know of the choices in a plan, in a line each.

Knows nothing about how the choices are made.
"""

from collections.abc import Iterator

from offload.tiers import Device
from planner.budget import format_size
from planner.memory import memory_needs
from planner.plan import WeightsForm
from planner.question import Here, Question
from planner.refusal import smaller_type
from planner.streamed import all_slots
from planner.ways import PREFILL_CHUNK_TOKENS, Fit, default_context


def context_notes(question: Question, context_tokens: int) -> Iterator[str]:
    """What was chosen where no context was asked for, and a warning beyond the trained one."""
    wanted, trained = question.wish.context_tokens, question.shape.context_length
    if wanted is None and context_tokens < default_context(question.shape):
        yield f"context cut to {context_tokens} tokens by memory; the model was trained on {trained}"
    elif wanted is None and context_tokens < trained:
        yield f"context of {context_tokens} tokens by default; -c sets up to the {trained} of the training"
    elif context_tokens > trained:
        yield f"context of {context_tokens} tokens is beyond the {trained} of the training: answers may degrade"


def way_notes(question: Question, here: Here, fit: Fit, *, gpu_fits: bool, threads: int) -> Iterator[str]:
    """What else there is to say of a way of running a model on this machine with `threads`."""
    if fit.way.form is WeightsForm.QUANTISED:
        needs = memory_needs(
            question.shape,
            question.budget,
            fit.way.device,
            WeightsForm.FLOAT32,
            context_tokens=fit.context_tokens,
            chunk_tokens=fit.chunk_tokens,
        )
        needed = format_size(needs.ram.needed_bytes)
        yield f"weights are made float32 on every use: a budget of {needed} RAM would hold them ready"
    if fit.way.streams:
        yield from _stream_notes(question, fit)
    if fit.chunk_tokens < min(PREFILL_CHUNK_TOKENS, fit.context_tokens):
        yield f"prompts are read {fit.chunk_tokens} tokens at a time to save memory"
    if here.gpu is not None and fit.way.device is Device.CPU:
        if gpu_fits:
            yield f"{here.gpu.name} is not used: the CPU is predicted to be quicker"
        else:
            room = format_size(question.budget.gpu_bytes)
            yield f"{here.gpu.name} is not used: the model does not fit its {room} as float32"
    cores = here.profile.threads
    if question.wish.threads is None and threads < cores:
        yield "one thread: the matrices are too small to be shared out"
    if question.wish.threads is not None and threads > cores:
        yield f"{threads} threads are more than the {cores} cores that may be used"


def _stream_notes(question: Question, fit: Fit) -> Iterator[str]:
    """What is read from flash, and what would not need to be."""
    shape, budget = question.shape, question.budget
    what = "experts" if shape.expert_count else "layers"
    yield f"RAM has room for {fit.stream_slots} of {all_slots(shape)} {what}; others are read from flash when needed"
    tokens = {"context_tokens": fit.context_tokens, "chunk_tokens": fit.chunk_tokens}
    whole = memory_needs(shape, budget, fit.way.device, fit.way.form, **tokens).ram
    if smaller := smaller_type(shape, whole, budget.ram_bytes):
        yield f"this model as {smaller} or smaller would fit in RAM"
