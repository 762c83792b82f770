"""Finds a plan: where every unit goes so that all of it fits, or the reason why nothing does.

The first form: everything on the GPU if it fits there as float32, else everything in RAM, packed for the CPU's kernels.
Refuses before anything is loaded. Reads no tensor data.

Invariant: a plan's needs, margins included, are within its budget in every memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cpu_kernels.reference.dequantize import dequantizable
from gpu_kernels import capabilities
from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import RequestError, UnsupportedModelError
from offload.gguf import GGUFFile
from offload.tiers import Device, Tier
from planner import cost
from planner.budget import Budget, format_size, measure_budget
from planner.memory import FLOAT32_BYTES, fits, memory_needs
from planner.model_shape import ModelShape, UnitKind
from planner.plan import (
    FORMAT_VERSION,
    Needs,
    Placement,
    Plan,
    PlannedModel,
    Settings,
    WeightsForm,
)
from planner.profile import Profile, load_or_measure, with_dequantize_rates, with_gpu_rates
from planner.refusal import refusal

DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_PROMPT_TOKENS = 128
PREFILL_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS = 32
MAX_CONTEXT_TOKENS = 1 << 24
# Below this mean size of a matrix (float32) a second thread costs more than it brings in decode: 2.09 ms a token with
# one, 2.26 ms with two for matrices of 256 x 256 on two cores of an AMD EPYC, and ten times as long on a busy machine.
SHARED_PRODUCT_BYTES = 1 << 20
AUTO, PROGRAM, SEQUENTIAL, LLAMA_CPP = "auto", "program", "sequential", "llama.cpp"
_CONTEXT_STEP = 64


@dataclass(frozen=True, slots=True)
class _Way:
    """A loop on a device, and the form it holds weights in."""

    loop: str
    device: Device
    form: WeightsForm


# What may be asked for, and how it can be done: the quickest way first, the one that needs least RAM last.
WAYS: Mapping[str, tuple[_Way, ...]] = {
    AUTO: (
        _Way(SEQUENTIAL, Device.GPU, WeightsForm.FLOAT32),
        _Way(PROGRAM, Device.CPU, WeightsForm.PACKED),
    ),
    PROGRAM: (_Way(PROGRAM, Device.CPU, WeightsForm.PACKED),),
    SEQUENTIAL: (
        _Way(SEQUENTIAL, Device.GPU, WeightsForm.FLOAT32),
        _Way(SEQUENTIAL, Device.CPU, WeightsForm.FLOAT32),
        _Way(SEQUENTIAL, Device.CPU, WeightsForm.QUANTISED),
    ),
    LLAMA_CPP: (
        _Way(LLAMA_CPP, Device.GPU, WeightsForm.PACKED),
        _Way(LLAMA_CPP, Device.CPU, WeightsForm.PACKED),
    ),
}


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to run the model, with what it needs."""

    way: _Way
    context_tokens: int
    chunk_tokens: int
    needs: Needs


def plan_here(
    gguf: GGUFFile,
    *,
    context_tokens: int | None = None,
    threads: int | None = None,
    budget: Budget | None = None,
    loop: str = AUTO,
    prompt_tokens: int | None = None,
) -> Plan:
    """`make_plan` for this machine as it is now: GPU, profile and, where none is given, the budget are measured."""
    gpu = capabilities.detect()
    return make_plan(
        gguf,
        budget=budget or measure_budget(gpu),
        profile=load_or_measure(),
        context_tokens=context_tokens,
        threads=threads,
        gpu=gpu,
        loop=loop,
        prompt_tokens=prompt_tokens,
    )


def make_plan(
    gguf: GGUFFile,
    *,
    budget: Budget,
    profile: Profile,
    context_tokens: int | None = None,
    threads: int | None = None,
    gpu: GpuCapabilities | None = None,
    loop: str = AUTO,
    prompt_tokens: int | None = None,
) -> Plan:
    """The plan for `gguf` within `budget`; `prompt_tokens` is the prompt length that speed is predicted for.

    A context of None is chosen: the trained one, at most 4096 tokens, less where memory is short. DoesNotFitError
    with what would fit, UnsupportedModelError for a quant type that cannot be computed with.
    """
    _check_request(context_tokens, threads, prompt_tokens)
    if loop not in WAYS:
        raise RequestError(f"there is no loop {loop!r}", hint=f"choose one of {', '.join(WAYS)}")
    shape = ModelShape.from_gguf(gguf)
    if loop != LLAMA_CPP:
        _check_types(gguf)
    ways = [way for way in WAYS[loop] if way.device is Device.CPU or gpu is not None]
    choice = _choose(gguf, shape, budget, context_tokens, ways)
    if choice.way.device is Device.GPU and gpu is not None:
        profile = with_gpu_rates(profile, gpu)
    if choice.way.form is WeightsForm.QUANTISED:
        profile = with_dequantize_rates(profile, {tensor.quant_type for tensor in gguf.tensors.values()})
    model = _model(gguf, shape)
    settings = Settings(
        context_tokens=choice.context_tokens,
        prefill_chunk_tokens=choice.chunk_tokens,
        threads=threads or _threads(shape, profile),
        weights_form=choice.way.form,
        kv_dtype="float16",
        loop=choice.way.loop,
        device=gpu.torch_device if choice.way.device is Device.GPU and gpu is not None else "cpu",
    )
    prompt = min(prompt_tokens or DEFAULT_PROMPT_TOKENS, max(choice.context_tokens - 1, 1))
    plan = Plan(
        version=FORMAT_VERSION,
        model=model,
        placements=tuple(_placements(shape, choice)),
        settings=settings,
        budget=budget,
        needs=choice.needs,
        predicted=cost.predict(
            shape, profile, model=model, settings=settings, needs=choice.needs, prompt_tokens=prompt
        ),
        notes=(
            *_context_notes(shape, choice, context_tokens),
            *_other_notes(shape, choice, budget=budget, profile=profile, threads=threads, gpu=gpu),
        ),
    )
    plan.check()
    return plan


def for_prompt(plan: Plan, gguf: GGUFFile, prompt_tokens: int) -> Plan:
    """`plan` with its speed predicted for a prompt of `prompt_tokens`, from the profile as it is now."""
    profile = load_or_measure()
    if plan.settings.weights_form is WeightsForm.QUANTISED:
        profile = with_dequantize_rates(profile, {tensor.quant_type for tensor in gguf.tensors.values()})
    shape = ModelShape.from_gguf(gguf)
    prompt = min(max(prompt_tokens, 1), plan.settings.context_tokens)
    predicted = cost.predict(
        shape, profile, model=plan.model, settings=plan.settings, needs=plan.needs, prompt_tokens=prompt
    )
    return replace(plan, predicted=predicted)


def _choose(
    gguf: GGUFFile, shape: ModelShape, budget: Budget, context_tokens: int | None, ways: Sequence[_Way]
) -> _Choice:
    """The first way to hold the model that fits; DoesNotFitError where there is none. The last one takes least RAM."""
    wanted = context_tokens or min(shape.context_length, DEFAULT_CONTEXT_TOKENS)
    for way in ways:
        choice = _fit(shape, budget, way, wanted)
        if choice is not None:
            return choice
    shorter = _longest_context(shape, budget, ways[-1], wanted)
    if context_tokens is None and shorter is not None:
        return shorter
    smallest = memory_needs(
        shape,
        budget,
        ways[-1].device,
        ways[-1].form,
        context_tokens=wanted,
        chunk_tokens=min(MIN_CHUNK_TOKENS, wanted),
    )
    raise refusal(
        str(gguf.path),
        shape,
        budget,
        smallest.ram,
        context_tokens=wanted,
        fitting_context_tokens=shorter.context_tokens if shorter is not None else None,
    )


def _fit(shape: ModelShape, budget: Budget, way: _Way, context_tokens: int) -> _Choice | None:
    """This way of holding the model with the largest prefill chunk that fits."""
    chunk = min(PREFILL_CHUNK_TOKENS, context_tokens)
    while True:
        needs = memory_needs(shape, budget, way.device, way.form, context_tokens=context_tokens, chunk_tokens=chunk)
        if fits(needs, budget):
            return _Choice(way, context_tokens, chunk, needs)
        if chunk <= MIN_CHUNK_TOKENS:
            return None
        chunk = max(chunk // 2, MIN_CHUNK_TOKENS)


def _longest_context(shape: ModelShape, budget: Budget, way: _Way, below: int) -> _Choice | None:
    """The longest context of at most `below` tokens that fits in this way, in steps of 64."""
    best, low, high = None, 1, below // _CONTEXT_STEP
    while low <= high:
        middle = (low + high) // 2
        choice = _fit(shape, budget, way, middle * _CONTEXT_STEP)
        if choice is None:
            high = middle - 1
        else:
            best, low = choice, middle + 1
    return best


def _placements(shape: ModelShape, choice: _Choice) -> Iterator[Placement]:
    """Every unit, and the KV cache of every layer, in the order a token meets them."""
    tier = Tier.GPU if choice.way.device is Device.GPU else Tier.RAM
    for unit in shape.units:
        held = FLOAT32_BYTES * unit.num_weights if choice.way.form is WeightsForm.FLOAT32 else unit.num_bytes
        yield Placement(unit.name, unit.kind, unit.layer, held, tier, choice.way.device)
        if unit.kind is UnitKind.ATTENTION and unit.layer is not None:
            num_bytes = shape.kv_bytes_per_layer[unit.layer] * choice.context_tokens
            yield Placement(f"blk.{unit.layer}.kv", UnitKind.KV, unit.layer, num_bytes, tier, choice.way.device)


def _context_notes(shape: ModelShape, choice: _Choice, asked_tokens: int | None) -> Iterator[str]:
    """What was chosen where no context was asked for, and a warning beyond the trained one."""
    context, trained = choice.context_tokens, shape.context_length
    if asked_tokens is None and context < min(trained, DEFAULT_CONTEXT_TOKENS):
        yield f"context cut to {context} tokens by memory; the model was trained on {trained}"
    elif asked_tokens is None and context < trained:
        yield f"context of {context} tokens by default; -c sets up to the {trained} of the training"
    elif context > trained:
        yield f"context of {context} tokens is beyond the {trained} of the training: answers may degrade"


def _other_notes(
    shape: ModelShape,
    choice: _Choice,
    *,
    budget: Budget,
    profile: Profile,
    threads: int | None,
    gpu: GpuCapabilities | None,
) -> Iterator[str]:
    """What else a user should know of the choices made."""
    if choice.way.form is WeightsForm.QUANTISED:
        needs = memory_needs(
            shape,
            budget,
            choice.way.device,
            WeightsForm.FLOAT32,
            context_tokens=choice.context_tokens,
            chunk_tokens=choice.chunk_tokens,
        )
        needed = format_size(needs.ram.needed_bytes)
        yield f"weights are made float32 on every use: a budget of {needed} RAM would hold them ready"
    if choice.chunk_tokens < min(PREFILL_CHUNK_TOKENS, choice.context_tokens):
        yield f"prompts are read {choice.chunk_tokens} tokens at a time to save memory"
    if gpu is not None and choice.way.device is Device.CPU:
        yield f"{gpu.name} is not used: the model does not fit its {format_size(budget.gpu_bytes)} as float32"
    if threads is None and _threads(shape, profile) < profile.threads:
        yield "one thread: the matrices are too small to be shared out"
    if threads is not None and threads > profile.threads:
        yield f"{threads} threads are more than the {profile.threads} cores that may be used"


def _threads(shape: ModelShape, profile: Profile) -> int:
    """One thread for products too small to share out, else all there are."""
    products = max(shape.num_matmuls_per_token, 1)
    return profile.threads if FLOAT32_BYTES * shape.active_weights / products >= SHARED_PRODUCT_BYTES else 1


def _model(gguf: GGUFFile, shape: ModelShape) -> PlannedModel:
    return PlannedModel(
        path=str(gguf.path),
        byte_size=gguf.byte_size,
        architecture=shape.architecture,
        num_parameters=shape.num_parameters,
        active_parameters=shape.active_parameters,
        block_count=shape.block_count,
        context_length=shape.context_length,
        vocab_size=shape.vocab_size,
        expert_count=shape.expert_count,
        expert_used_count=shape.expert_used_count,
        tied_output=shape.tied_output,
    )


def _check_request(context_tokens: int | None, threads: int | None, prompt_tokens: int | None) -> None:
    if context_tokens is not None and not 1 <= context_tokens <= MAX_CONTEXT_TOKENS:
        raise RequestError(f"a context of {context_tokens} tokens: it must be 1 to {MAX_CONTEXT_TOKENS}")
    if threads is not None and not 1 <= threads <= 4096:
        raise RequestError(f"{threads} threads: it must be 1 to 4096")
    if prompt_tokens is not None and prompt_tokens < 1:
        raise RequestError(f"a prompt of {prompt_tokens} tokens: it must be at least 1")


def _check_types(gguf: GGUFFile) -> None:
    for tensor in gguf.tensors.values():
        if not dequantizable(tensor.quant_type):
            raise UnsupportedModelError(
                f"{gguf.path}: {tensor.quant_type.name} of tensor {tensor.name} is not supported",
                hint="use a file of another quant type",
            )
