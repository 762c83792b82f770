"""Whether a plan read from a file can be run: hand edits are held against what this version executes, and the model.

Each refusal names the field, what is wrong with it, and what would be right. Knows nothing about how plans are found.
"""

from offload.errors import PlanError
from offload.gguf import GGUFFile
from offload.tiers import Device
from planner.hybrid_check import check_split, least_host_kv_bytes, split_bytes, split_needs
from planner.kv_spill import least_kv_ram_bytes
from planner.memory import memory_needs
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.streamed import streamed_needs
from planner.ways import EXECUTED, HYBRID, held_units, spilled_needs, tier_of


def check_runnable(plan: Plan, gguf: GGUFFile) -> Plan:
    """This plan; PlanError where it is another model's or machine's, or cannot be carried out as it stands."""
    plan.checked_for(gguf)
    if not plan.machine.here:
        raise PlanError(
            f"machine: the plan is for {plan.machine.name}; it was planned and simulated, and cannot be run",
            hint="plan for this machine: leave out --machine",
        )
    shape = ModelShape.from_gguf(gguf, plan.settings.kv)
    _check_way(plan, shape)
    _check_units(plan, shape)
    _check_needs(plan, shape)
    return plan


def _check_way(plan: Plan, shape: ModelShape) -> None:
    """PlanError where loop, device, form and placements are together nothing that this version executes."""
    settings = plan.settings
    loops = list(dict.fromkeys(way.loop for way in EXECUTED))
    if settings.loop not in loops:
        raise PlanError(f"settings.loop is {settings.loop!r}; it must be one of {', '.join(loops)}")
    device = Device.CPU if settings.device == "cpu" else Device.GPU
    ways = [way for way in EXECUTED if (way.loop, way.device) == (settings.loop, device)]
    if not ways:
        raise PlanError(f"settings.device is {settings.device!r}; the {settings.loop} loop runs on cpu")
    forms = [way.form for way in ways]
    if settings.weights_form not in forms:
        raise PlanError(
            f"settings.weights_form is {settings.weights_form.value}; the {settings.loop} loop on {settings.device} "
            f"takes {' or '.join(forms)}"
        )
    for name in ("gpu_slots", "gpu_kv_tokens"):
        if getattr(settings, name) and settings.loop != HYBRID:
            raise PlanError(f"settings.{name} is {getattr(settings, name)}; the {settings.loop} loop has none")
    way = next((way for way in ways if way.streams == bool(settings.stream_slots)), None)
    if way is None:
        raise PlanError(
            f"settings.stream_slots is {settings.stream_slots}; the {settings.loop} loop on {settings.device} has none"
        )
    if settings.loop == HYBRID:
        check_split(plan, shape)
        return
    for index, placement in enumerate(plan.placements):
        tier = tier_of(shape, way, placement.unit)
        if (placement.tier, placement.device) != (tier, device):
            raise PlanError(
                f"placements[{index}]: {placement.unit} is put in {placement.tier.value} and computed on "
                f"{placement.device.value}; the {settings.loop} loop on {settings.device} with "
                f"{settings.stream_slots} slots holds it in {tier.value}",
                hint="other placements are planned and simulated by this version, not executed yet",
            )


def _check_units(plan: Plan, shape: ModelShape) -> None:
    """PlanError where the placements are not the model's units, or their bytes not those of the settings."""
    settings = plan.settings
    if settings.loop == HYBRID:
        right = split_bytes(plan, shape)
    else:
        units = held_units(shape, settings.weights_form, settings.context_tokens, settings.kv_ram_bytes)
        right = {name: num_bytes for name, _, num_bytes in units}
    for index, placement in enumerate(plan.placements):
        where = f"placements[{index}]"
        if placement.unit not in right:
            raise PlanError(f"{where}.unit: the model has no unit {placement.unit!r}")
        if placement.num_bytes != right[placement.unit]:
            raise PlanError(
                f"{where}.num_bytes of {placement.unit} is {placement.num_bytes}; with weights "
                f"{settings.weights_form.value} and {settings.context_tokens} tokens of context it is "
                f"{right[placement.unit]}",
                hint=f"plan again with `strata plan -c {settings.context_tokens}`",
            )
    if missing := sorted(right.keys() - {placement.unit for placement in plan.placements}):
        raise PlanError(
            f"placements: {missing[0]} is missing; every unit of the model must be placed",
            hint="plan again with `strata plan`",
        )


def _check_needs(plan: Plan, shape: ModelShape) -> None:
    """PlanError where the settings take more memory than the plan says."""
    settings = plan.settings
    tokens = {"context_tokens": settings.context_tokens, "chunk_tokens": settings.prefill_chunk_tokens}
    is_hybrid = settings.loop == HYBRID
    least = least_host_kv_bytes(plan, shape) if is_hybrid else least_kv_ram_bytes(shape, settings.context_tokens)
    if settings.kv_ram_bytes is not None and settings.kv_ram_bytes < least:
        raise PlanError(
            f"settings.kv_ram_bytes is {settings.kv_ram_bytes}; {settings.context_tokens} tokens of context need "
            f"at least {least}"
        )
    if is_hybrid:
        right = split_needs(plan, shape)
    elif settings.stream_slots:
        slots, kept_bytes = settings.stream_slots, settings.kv_ram_bytes
        right = streamed_needs(shape, plan.budget, **tokens, slots=slots, kv_ram_bytes=kept_bytes)
    elif settings.kv_ram_bytes is not None:
        kept = {**tokens, "kv_ram_bytes": settings.kv_ram_bytes}
        right = spilled_needs(shape, plan.budget, settings.weights_form, **kept)
    else:
        device = Device.CPU if settings.device == "cpu" else Device.GPU
        right = memory_needs(shape, plan.budget, device, settings.weights_form, **tokens)
    for name, said, needed in (("ram", plan.needs.ram, right.ram), ("gpu", plan.needs.gpu, right.gpu)):
        if said.peak_bytes < needed.peak_bytes:
            raise PlanError(
                f"needs.{name} adds up to {said.peak_bytes} bytes; with prefill_chunk_tokens "
                f"{settings.prefill_chunk_tokens} and context_tokens {settings.context_tokens} it is "
                f"{needed.peak_bytes}",
                hint=f"plan again with `strata plan -c {settings.context_tokens}`",
            )
