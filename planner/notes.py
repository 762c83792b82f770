"""What a user should know of the choices in a plan, in a line each.

Knows nothing about how the choices are made.
"""

from collections.abc import Iterator, Sequence

from gpu_kernels.capabilities import GpuCapabilities
from offload.tiers import Device
from planner.budget import format_size
from planner.figures import plural
from planner.gpu_choice import is_simulated
from planner.memory import memory_needs
from planner.model_shape import UnitKind
from planner.plan import WeightsForm
from planner.question import Here, Question
from planner.refusal import smaller_type
from planner.streamed import all_slots
from planner.ways import AUTO, HYBRID, PREFILL_CHUNK_TOKENS, SEQUENTIAL, Fit, Way, default_context


def context_notes(question: Question, context_tokens: int) -> Iterator[str]:
    """What was chosen where no context was asked for, and a warning beyond the trained one."""
    wanted, trained = question.wish.context_tokens, question.shape.context_length
    if wanted is None and context_tokens < default_context(question.shape):
        yield f"context cut to {context_tokens} tokens by memory; the model was trained on {trained}"
    elif wanted is None and context_tokens < trained:
        yield f"context of {context_tokens} tokens by default; -c sets up to the {trained} of the training"
    elif context_tokens > trained:
        yield f"context of {context_tokens} tokens is beyond the {trained} of the training: answers may degrade"


def way_notes(question: Question, here: Here, fit: Fit, *, others: Sequence[Way], threads: int) -> Iterator[str]:
    """What else there is to say of a way of running a model on this machine with `threads`, `others` fitting too."""
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
    if here.gpu is not None:
        yield from _gpu_notes(question, here.gpu, fit, others)
    cores = here.profile.threads
    if question.wish.threads is None and threads < cores:
        yield from _thread_notes(here.gpu, fit, threads)
    if question.wish.threads is not None and threads > cores:
        yield f"{threads} threads are more than the {cores} cores that may be used"


def _gpu_notes(question: Question, gpu: GpuCapabilities, fit: Fit, others: Sequence[Way]) -> Iterator[str]:
    """What the GPU does, or why it does nothing; and that what it does is simulated."""
    room = format_size(question.budget.gpu_bytes)
    if fit.way.device is Device.GPU:
        if is_simulated(gpu.torch_device):
            yield f"the GPU is simulated ({gpu.torch_device}): speeds and GPU memory are those of the simulation"
            yield "the CPU does the simulated GPU's arithmetic: where that takes longer, runs are slower than predicted"
        if fit.gpu_slots:
            every = question.shape.expert_count * sum(unit.kind is UnitKind.EXPERTS for unit in question.shape.units)
            yield f"the GPU has room for {fit.gpu_slots} of {every} experts; the CPU computes the others"
        if fit.gpu_kv_tokens is not None:
            newest = f"keys and values of the newest {fit.gpu_kv_tokens} of {fit.context_tokens} tokens"
            yield f"the GPU has room for {newest}; the CPU attends over older ones in RAM, beside it"
    elif any(way.device is Device.GPU for way in others):
        yield f"{gpu.name} is not used: the CPU alone is predicted to be quicker"
    elif question.wish.loop in (AUTO, HYBRID):
        yield f"{gpu.name} is not used: no part of the model fits its {room} beside what a prompt needs, or none pays"
    elif question.wish.loop == SEQUENTIAL and not is_simulated(gpu.torch_device):
        yield f"{gpu.name} is not used: the model does not fit its {room} as float32"
    else:
        yield f"{gpu.name} is not used: the {question.wish.loop} loop runs on the CPU"


def _thread_notes(gpu: GpuCapabilities | None, fit: Fit, threads: int) -> Iterator[str]:
    if fit.way.device is Device.GPU and gpu is not None and is_simulated(gpu.torch_device):
        yield f"{threads} {plural(threads, 'thread')}: the simulated GPU computes on a core of the CPU"
    else:
        yield "one thread: the matrices are too small to be shared out"


def _stream_notes(question: Question, fit: Fit) -> Iterator[str]:
    """What is read from flash, and what would not need to be."""
    shape, budget = question.shape, question.budget
    what = "experts" if shape.expert_count else "layers"
    yield f"RAM has room for {fit.stream_slots} of {all_slots(shape)} {what}; others are read from flash when needed"
    tokens = {"context_tokens": fit.context_tokens, "chunk_tokens": fit.chunk_tokens}
    whole = memory_needs(shape, budget, Device.CPU, fit.way.form, **tokens).ram
    if smaller := smaller_type(shape, whole, budget.ram_bytes):
        yield f"this model as {smaller} or smaller would fit in RAM"
