"""Whether a hybrid plan read from a file can be run: its placements are held against what the hybrid executor can do.

Each refusal names the field, what is wrong with it, and what would be right. Knows nothing about how plans are found.
"""

from offload.errors import PlanError
from offload.tiers import Device, Tier
from planner.gpu_choice import is_simulated, simulated_spec
from planner.hybrid_needs import cache_bytes, needs_of
from planner.hybrid_parts import Part, gpu_bytes, parts
from planner.hybrid_spill import HostKV
from planner.hybrid_split import Split, split_of
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Needs, Placement, Plan

_HINT = "plan again with `strata plan`"


def check_split(plan: Plan, shape: ModelShape) -> None:
    """PlanError where placements, device or slots are nothing that the hybrid executor can do."""
    if is_simulated(plan.settings.device):
        simulated_spec(plan.settings.device)
    if plan.settings.stream_slots and not shape.expert_count:
        raise PlanError(
            f"settings.stream_slots is {plan.settings.stream_slots}; the hybrid loop has none for dense models",
            hint=_HINT,
        )
    placed = {placement.unit: (index, placement) for index, placement in enumerate(plan.placements)}
    for index, placement in placed.values():
        is_read = placement.kind is UnitKind.EXPERTS and plan.settings.stream_slots > 0
        cpus = Tier.FLASH if is_read else Tier.RAM
        if (placement.tier, placement.device) not in {(Tier.GPU, Device.GPU), (cpus, Device.CPU)}:
            raise PlanError(
                f"placements[{index}]: {placement.unit} is put in {placement.tier.value} and computed on "
                f"{placement.device.value}; with {plan.settings.stream_slots} slots the hybrid loop computes it in gpu "
                f"on gpu, or in {cpus.value} on cpu",
                hint=_HINT,
            )
    for part in parts(shape):
        _check_part(part, placed)
    split = split_of(shape, plan.placements, plan.settings.gpu_slots, plan.settings.gpu_kv_tokens)
    _check_experts(split, placed)
    _check_slots(shape, split, plan.settings.gpu_slots)


def split_bytes(plan: Plan, shape: ModelShape) -> dict[str, int]:
    """Bytes that each placement must say."""
    on_gpu = {placement.unit for placement in plan.placements if placement.device is Device.GPU}
    right = {unit.name: gpu_bytes(unit) if unit.name in on_gpu else unit.num_bytes for unit in shape.units}
    settings = plan.settings
    split = split_of(shape, plan.placements, settings.gpu_slots, settings.gpu_kv_tokens)
    for part in parts(shape):
        if part.kind is UnitKind.ATTENTION and part.layer is not None:
            held = cache_bytes(shape, split, part, settings.context_tokens, settings.kv_ram_bytes)
            right[f"blk.{part.layer}.kv"] = held
    return right


def split_needs(plan: Plan, shape: ModelShape) -> Needs:
    """What the split of a plan needs of both memories."""
    settings = plan.settings
    split = split_of(shape, plan.placements, settings.gpu_slots, settings.gpu_kv_tokens)
    tokens = {"context_tokens": settings.context_tokens, "chunk_tokens": settings.prefill_chunk_tokens}
    kept, slots = settings.kv_ram_bytes, settings.stream_slots
    return needs_of(shape, plan.budget, settings.device, split, **tokens, stream_slots=slots, kv_ram_bytes=kept)


def least_host_kv_bytes(plan: Plan, shape: ModelShape) -> int:
    """The least RAM for what the GPU does not hold of keys and values."""
    settings = plan.settings
    split = split_of(shape, plan.placements, settings.gpu_slots, settings.gpu_kv_tokens)
    return HostKV.of(shape, split, settings.context_tokens).least_bytes


def _check_part(part: Part, placed: dict[str, tuple[int, Placement]]) -> None:
    """PlanError where what must be together is not, or is where it cannot be computed. Missing units are not seen."""
    names = [unit.name for unit in part.units]
    if part.kind is UnitKind.ATTENTION and part.layer is not None:
        names.append(f"blk.{part.layer}.kv")
    here = [placed[name] for name in names if name in placed]
    for index, placement in here:
        if placement.device is not here[0][1].device:
            raise PlanError(
                f"placements[{index}]: {placement.unit} is computed on {placement.device.value} and "
                f"{here[0][1].unit} on {here[0][1].device.value}; the hybrid loop computes both on one device"
            )
        if placement.device is Device.GPU and not part.may_be_on_gpu:
            raise PlanError(
                f"placements[{index}]: {placement.unit} is computed on gpu; the hybrid loop computes it on cpu",
                hint="it is looked up, or of a quant type without kernels for the GPU",
            )


def _check_experts(split: Split, placed: dict[str, tuple[int, Placement]]) -> None:
    for layer in sorted(split.resident - split.feed_forward):
        index, placement = placed[f"blk.{layer}.experts"]
        raise PlanError(
            f"placements[{index}]: {placement.unit} is computed on gpu, and the layer's router on cpu; the hybrid loop "
            "computes experts on the gpu where their router is"
        )


def _check_slots(shape: ModelShape, split: Split, slots: int) -> None:
    count = shape.expert_count
    least = len(split.resident) * count
    most = least + len(split.cached_layers(shape)) * count
    if not least <= slots <= most:
        where = f"from {least} to {most}" if most > least else f"{least}"
        raise PlanError(
            f"settings.gpu_slots is {slots}; with {len(split.resident)} layers of experts on the gpu and "
            f"{len(split.cached_layers(shape))} with the rest of their feed-forward there, it must be {where}",
            hint=_HINT,
        )
    if split.is_empty:
        raise PlanError("placements: nothing is computed on gpu; that is what the program loop does", hint=_HINT)
