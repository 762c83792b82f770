"""What this version executes: loops on devices, where each holds a model, and how a model fits there.

A model is held in one memory as a whole, or all of it but its experts, or a dense model's layers, which are then read
from flash into slots when a step needs them; so may be keys and values. Knows nothing about speed. Anything else than
these ways is planned and simulated, not run.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from offload.errors import RequestError
from offload.tiers import Device, Tier
from planner.budget import Budget
from planner.kv_spill import all_kv_bytes, least_kv_ram_bytes
from planner.memory import FLOAT32_BYTES, fits, memory_needs
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Needs, Placement, WeightsForm
from planner.streamed import all_slots, least_slots, slot_bytes, streamed_needs, streamed_units

DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_PROMPT_TOKENS = 128
PREFILL_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS = 32
AUTO, HYBRID, PROGRAM, SEQUENTIAL, LLAMA_CPP = "auto", "hybrid", "program", "sequential", "llama.cpp"
_CONTEXT_STEP = 64


@dataclass(frozen=True, slots=True)
class Way:
    """A loop on a device, and the form it holds weights in."""

    loop: str
    device: Device
    form: WeightsForm
    streams: bool = False  # from flash what `streamed.streamed_units` tells
    spills: bool = False  # keys and values to flash

    @property
    def tier(self) -> Tier:
        """The memory that holds all that is not streamed."""
        return Tier.GPU if self.device is Device.GPU else Tier.RAM


HYBRID_WAY = Way(HYBRID, Device.GPU, WeightsForm.PACKED)  # parts on the GPU, parts on the CPU: see `planner.hybrid`
SPILLED_HYBRID_WAY = Way(HYBRID, Device.GPU, WeightsForm.PACKED, spills=True)
STREAMED_HYBRID_WAY = Way(HYBRID, Device.GPU, WeightsForm.PACKED, streams=True)
# Of each device the quickest way first, the one that needs least RAM last.
EXECUTED = (
    HYBRID_WAY,
    SPILLED_HYBRID_WAY,
    STREAMED_HYBRID_WAY,
    Way(SEQUENTIAL, Device.GPU, WeightsForm.FLOAT32),
    Way(PROGRAM, Device.CPU, WeightsForm.PACKED),
    Way(PROGRAM, Device.CPU, WeightsForm.PACKED, spills=True),
    Way(PROGRAM, Device.CPU, WeightsForm.PACKED, streams=True),
    Way(PROGRAM, Device.CPU, WeightsForm.PACKED, streams=True, spills=True),
    Way(SEQUENTIAL, Device.CPU, WeightsForm.FLOAT32),
    Way(SEQUENTIAL, Device.CPU, WeightsForm.QUANTISED),
    Way(LLAMA_CPP, Device.GPU, WeightsForm.PACKED),
    Way(LLAMA_CPP, Device.CPU, WeightsForm.PACKED),
)
# What may be asked for, and how it can be done.
WAYS: Mapping[str, tuple[Way, ...]] = {
    AUTO: tuple(way for way in EXECUTED if way.loop in (HYBRID, PROGRAM)),
    **{loop: tuple(way for way in EXECUTED if way.loop == loop) for loop in (HYBRID, PROGRAM, SEQUENTIAL, LLAMA_CPP)},
}


@dataclass(frozen=True, slots=True)
class Fit:
    """A way to hold a model that fits, with what it needs."""

    way: Way
    context_tokens: int
    chunk_tokens: int
    needs: Needs
    stream_slots: int = 0
    gpu_slots: int = 0
    gpu_kv_tokens: int | None = None
    kv_ram_bytes: int | None = None
    placements: tuple[Placement, ...] = ()  # of a hybrid: others hold all in one way


def ways_for(loop: str, shape: ModelShape, *, has_gpu: bool) -> tuple[Way, ...]:
    """How `loop` can run a model with the devices there are; RequestError for a loop that is none."""
    if loop not in WAYS:
        raise RequestError(f"there is no loop {loop!r}", hint=f"choose one of {', '.join(WAYS)}")
    return tuple(
        way for way in WAYS[loop] if (way.device is Device.CPU or has_gpu) and (all_slots(shape) > 0 or not way.streams)
    )


def fitting(
    shape: ModelShape,
    budget: Budget,
    ways: Sequence[Way],
    context_tokens: int | None,
    kv_ram_bytes: int | None = None,
) -> tuple[Fit, ...]:
    """The first of `ways` that fits on each device; a context of None is chosen, and cut where memory is short.

    `kv_ram_bytes`: that keys and values may take at most, where not all that is free.
    """
    wanted = context_tokens or default_context(shape)
    found: dict[Device, Fit] = {}
    for way in ways:
        if way.device not in found and (fit := fit_way(shape, budget, way, wanted, kv_ram_bytes)) is not None:
            found[way.device] = fit
    if not found and context_tokens is None and (shorter := longest_context(shape, budget, ways, wanted, kv_ram_bytes)):
        return (shorter,)
    return tuple(found.values())


def default_context(shape: ModelShape) -> int:
    """The context where none is asked for: the trained one, at most 4096 tokens."""
    return min(shape.context_length, DEFAULT_CONTEXT_TOKENS)


def fit_way(
    shape: ModelShape, budget: Budget, way: Way, context_tokens: int, kv_ram_bytes: int | None = None
) -> Fit | None:
    """This way of holding the model with the largest prefill chunk that fits; `kv_ram_bytes` as for `fitting`."""
    if way.streams:
        kept = kv_ram_bytes if way.spills else None
        if way.spills and kept is None:
            kept = least_kv_ram_bytes(shape, context_tokens)
        return _fit_streamed(shape, budget, way, context_tokens, kept)
    if way.spills:
        return _fit_spilled(shape, budget, way, context_tokens, kv_ram_bytes)
    chunk = min(PREFILL_CHUNK_TOKENS, context_tokens)
    while True:
        needs = memory_needs(shape, budget, way.device, way.form, context_tokens=context_tokens, chunk_tokens=chunk)
        if fits(needs, budget):
            return Fit(way, context_tokens, chunk, needs)
        if chunk <= MIN_CHUNK_TOKENS:
            return None
        chunk = max(chunk // 2, MIN_CHUNK_TOKENS)


def _fit_spilled(
    shape: ModelShape, budget: Budget, way: Way, context_tokens: int, most_kv_bytes: int | None
) -> Fit | None:
    """As much of the keys and values in RAM as there is room for, and no more than `most_kv_bytes`."""
    chunk = min(PREFILL_CHUNK_TOKENS, context_tokens)
    tokens = {"context_tokens": context_tokens, "chunk_tokens": chunk}
    room = budget.ram_bytes - spilled_needs(shape, budget, way.form, **tokens, kv_ram_bytes=0).ram.needed_bytes
    kv_bytes = min(room, all_kv_bytes(shape, context_tokens), sys.maxsize if most_kv_bytes is None else most_kv_bytes)
    if kv_bytes < least_kv_ram_bytes(shape, context_tokens):
        return None
    needs = spilled_needs(shape, budget, way.form, **tokens, kv_ram_bytes=kv_bytes)
    return Fit(way, context_tokens, chunk, needs, kv_ram_bytes=kv_bytes)


def spilled_needs(
    shape: ModelShape, budget: Budget, form: WeightsForm, *, context_tokens: int, chunk_tokens: int, kv_ram_bytes: int
) -> Needs:
    """As `memory_needs` on the CPU, with so much RAM for keys and values, the rest of which lies on flash."""
    needs = memory_needs(shape, budget, Device.CPU, form, context_tokens=context_tokens, chunk_tokens=chunk_tokens)
    spilled = shape.kv_bytes_per_token * context_tokens - kv_ram_bytes
    return replace(needs, ram=replace(needs.ram, kv_bytes=needs.ram.kv_bytes - spilled))


def _fit_streamed(
    shape: ModelShape, budget: Budget, way: Way, context_tokens: int, kv_ram_bytes: int | None
) -> Fit | None:
    """As many slots as there is room for, with the largest chunk whose tokens' needs of a layer they can hold."""
    chunk = min(PREFILL_CHUNK_TOKENS, context_tokens)
    if kv_ram_bytes is not None:
        kv_ram_bytes = min(kv_ram_bytes, all_kv_bytes(shape, context_tokens))
    needs_of = partial(streamed_needs, shape, budget, context_tokens=context_tokens, kv_ram_bytes=kv_ram_bytes)
    while True:
        needs = needs_of(chunk_tokens=chunk, slots=0)
        slots = min((budget.ram_bytes - needs.ram.needed_bytes) // slot_bytes(shape), all_slots(shape))
        if slots >= least_slots(shape, chunk):
            needs = needs_of(chunk_tokens=chunk, slots=slots)
            return Fit(way, context_tokens, chunk, needs, slots, kv_ram_bytes=kv_ram_bytes)
        if chunk == 1:
            return None
        chunk //= 2


def longest_context(
    shape: ModelShape, budget: Budget, ways: Sequence[Way], below: int, kv_ram_bytes: int | None = None
) -> Fit | None:
    """The longest context of at most `below` tokens that fits on the CPU in any of the ways, in steps of 64."""
    usable = [way for way in ways if way.device is Device.CPU]
    best, low, high = None, 1, below // _CONTEXT_STEP
    while low <= high:
        middle = (low + high) // 2
        fits = (fit_way(shape, budget, way, middle * _CONTEXT_STEP, kv_ram_bytes) for way in usable)
        fit = next((fit for fit in fits if fit is not None), None)
        if fit is None:
            high = middle - 1
        else:
            best, low = fit, middle + 1
    return best


def held_units(
    shape: ModelShape, form: WeightsForm, context_tokens: int, kv_ram_bytes: int | None = None
) -> Iterator[tuple[str, UnitKind, int]]:
    """(name, kind, bytes in `form`) of every unit and each layer's KV cache, in the order a token meets them.

    With `kv_ram_bytes` for the keys and values of all layers, those in RAM alone.
    """
    for unit in shape.units:
        yield unit.name, unit.kind, FLOAT32_BYTES * unit.num_weights if form is WeightsForm.FLOAT32 else unit.num_bytes
        if unit.kind is UnitKind.ATTENTION and unit.layer is not None:
            if kv_ram_bytes is None:
                num_bytes = shape.kv_bytes_per_layer[unit.layer] * context_tokens
            else:  # in equal shares that add up
                before, behind = (kv_ram_bytes * layer // shape.block_count for layer in (unit.layer, unit.layer + 1))
                num_bytes = behind - before
            yield f"blk.{unit.layer}.kv", UnitKind.KV, num_bytes


def placements(shape: ModelShape, fit: Fit) -> tuple[Placement, ...]:
    """Every unit, and the KV cache of every layer, where `fit` holds and computes them."""
    return fit.placements or tuple(
        Placement(name, kind, layer_of(name), num_bytes, tier_of(shape, fit.way, name), fit.way.device)
        for name, kind, num_bytes in held_units(shape, fit.way.form, fit.context_tokens, fit.kv_ram_bytes)
    )


def tier_of(shape: ModelShape, way: Way, unit: str) -> Tier:
    """Where a unit, or a layer's KV cache, lies in this way of holding a model."""
    is_streamed = way.streams and any(unit == streamed.name for streamed in streamed_units(shape))
    return Tier.FLASH if is_streamed else way.tier


def layer_of(unit: str) -> int | None:
    """The layer in a unit's name, None outside the blocks."""
    words = unit.split(".")
    return int(words[1]) if words[0] == "blk" else None
