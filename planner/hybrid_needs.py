"""What a split of a model between a GPU and the CPU needs of both memories, and where its units lie.

Knows nothing about time, nor about how splits are found. Sizes are bytes.
"""

from collections.abc import Iterator
from dataclasses import replace

from cpu_kernels.kv_layout import pieces_of
from offload.flash import DEPTH
from offload.memory import HUGE_PAGE_BYTES
from offload.tiers import Device, Tier
from planner.budget import Budget
from planner.hybrid_memory import (
    buffers_bytes,
    gpu_activations_bytes,
    kv_tokens,
    ram_kv_tokens,
    reserved,
    with_gpu_in_ram,
)
from planner.hybrid_parts import Part, gpu_bytes, parts, ram_bytes
from planner.hybrid_spill import HostKV
from planner.hybrid_split import Split
from planner.model_shape import ModelShape, UnitKind
from planner.plan import MemoryNeeds, Needs, Placement
from planner.streamed import slot_bytes as ram_slot_bytes

BROUGHT_SHARE = 1 / 16  # of the GPU's memory, for experts that are brought for a step


def placements_of(
    shape: ModelShape, split: Split, context_tokens: int, *, streams: bool = False, kv_ram_bytes: int | None = None
) -> Iterator[Placement]:
    """Every unit, and the KV cache of every layer, where the split holds it.

    `streams`: the CPU's experts lie on flash. `kv_ram_bytes`: of what caches have outside of the GPU only so much is in
    RAM; None: all.
    """
    for part in parts(shape):
        device = split.device(part)
        away = Tier.FLASH if streams and part.kind is UnitKind.EXPERTS else Tier.RAM
        tier = Tier.GPU if device is Device.GPU else away
        for unit in part.units:
            num_bytes = gpu_bytes(unit) if device is Device.GPU else unit.num_bytes
            yield Placement(unit.name, unit.kind, unit.layer, num_bytes, tier, device)
        if part.kind is UnitKind.ATTENTION and part.layer is not None:
            held = cache_bytes(shape, split, part, context_tokens, kv_ram_bytes)
            yield Placement(f"blk.{part.layer}.kv", UnitKind.KV, part.layer, held, tier, device)


def cache_bytes(shape: ModelShape, split: Split, part: Part, context_tokens: int, kv_ram_bytes: int | None) -> int:
    """Bytes of a layer's cache in the memory of the device that attends to it; `kv_ram_bytes` as for `placements_of`.

    Of that the CPU's layers have equal shares, as far as it is not for older tokens of the GPU's layers.
    """
    if split.device(part) is Device.GPU:
        return part.kv_bytes * min(split.kv_tokens or context_tokens, context_tokens)
    if kv_ram_bytes is None:
        return part.kv_bytes * context_tokens
    pieces = HostKV.of(shape, split, context_tokens).pieces
    return kv_ram_bytes * pieces_of(context_tokens) // sum(pieces)


def needs_of(
    shape: ModelShape,
    budget: Budget,
    device: str,
    split: Split,
    *,
    context_tokens: int,
    chunk_tokens: int,
    stream_slots: int = 0,
    kv_ram_bytes: int | None = None,
) -> Needs:
    """What a split needs of both memories, margins included.

    `stream_slots`: of RAM, where it has not all experts. `kv_ram_bytes`: as for `placements_of`.
    """
    in_parts = split.kv_tokens is not None
    fixed = reserved(shape, budget, device, context_tokens=context_tokens, chunk_tokens=chunk_tokens, in_parts=in_parts)
    if stream_slots:
        fixed = with_readers(fixed)
    ram = replace(fixed.ram, slots_bytes=stream_slots * ram_slot_bytes(shape) if stream_slots else 0)
    gpu = fixed.gpu
    for part in parts(shape):
        if stream_slots and part.kind is UnitKind.EXPERTS and split.device(part) is Device.CPU:
            continue
        if split.device(part) is Device.GPU:
            gpu = _with(gpu, part.gpu_bytes, part.kv_bytes * kv_tokens(context_tokens, split.kv_tokens))
            ram = _with(ram, 0, part.kv_bytes * ram_kv_tokens(context_tokens, split.kv_tokens))
        else:
            ram = _with(ram, sum(map(ram_bytes, part.units)), part.kv_bytes * context_tokens)
    if kv_ram_bytes is not None:
        ram = replace(ram, kv_bytes=kv_ram_bytes)
    layers = split.cached_layers(shape)
    slots = split.cache_slots(shape) + kinds_of_experts(shape) * brought_slots(shape, budget, split)
    slots_bytes = slots * slot_bytes(shape, layers)
    tokens = min(chunk_tokens, context_tokens)
    activations = gpu_activations_bytes(shape, tokens, context_tokens, split, in_parts=in_parts)
    gpu = replace(
        gpu,
        slots_bytes=slots_bytes,
        activations_bytes=activations,
        buffers_bytes=buffers_bytes(shape, split, activations + slots_bytes + gpu.kv_bytes),
    )
    return with_gpu_in_ram(Needs(ram=ram, gpu=gpu), device)


def brought_slots(shape: ModelShape, budget: Budget, split: Split) -> int:
    """Places, for every kind of layer, for experts that are brought for a step; 0 where none would be."""
    layers = split.cached_layers(shape)
    if not layers or not split.cache_slots(shape):
        return 0
    room = int(BROUGHT_SHARE * budget.gpu_bytes) // kinds_of_experts(shape)
    return min(room // slot_bytes(shape, layers), shape.expert_count)


def kinds_of_experts(shape: ModelShape) -> int:
    """How many kinds of layers there are by the quant types of their experts."""
    experts = (unit for unit in shape.units if unit.kind is UnitKind.EXPERTS)
    return max(len({tuple(name for name, _ in unit.active_bytes_by_type) for unit in experts}), 1)


def slot_bytes(shape: ModelShape, layers: frozenset[int]) -> int:
    """What a slot takes that any expert of these layers fits in."""
    of_layers = (unit.num_bytes for unit in shape.units if unit.kind is UnitKind.EXPERTS and unit.layer in layers)
    return -(-max(of_layers, default=0) // max(shape.expert_count, 1))


def with_readers(fixed: Needs) -> Needs:
    """`fixed` with the memory through which experts come from flash: for the CPU's, and for the GPU's."""
    buffers_bytes = fixed.ram.buffers_bytes + 2 * DEPTH * HUGE_PAGE_BYTES
    return replace(fixed, ram=replace(fixed.ram, buffers_bytes=buffers_bytes))


def _with(memory: MemoryNeeds, weights_bytes: int, kv_bytes: int) -> MemoryNeeds:
    return replace(memory, weights_bytes=memory.weights_bytes + weights_bytes, kv_bytes=memory.kv_bytes + kv_bytes)
