"""What a pass over weights takes that are multiplied as they are in the file: every unit, and attention, on one device.

All of them are in its memory. Knows nothing about reads, nor about what a plan is for. Times are seconds.
"""

from planner import unit_cost
from planner.machine import Cpu, Gpu
from planner.machine_here import cpu_here, gpu_here
from planner.model_shape import ModelShape, Unit, UnitKind
from planner.plan import Settings
from planner.profile import Profile


def pass_seconds(
    shape: ModelShape, profile: Profile, settings: Settings, tokens: int, depth: int, *, logits: int = 1
) -> tuple[float, float]:
    """Seconds of `tokens` tokens behind `depth` others, with the logits of so many; and what of them experts take."""
    rates = (None if settings.device == "cpu" else gpu_here(profile)) or cpu_here(profile)
    known: dict[object, float] = {}  # layers are mostly alike
    seconds = experts_s = 0.0
    for unit in shape.units:
        if unit.kind is UnitKind.EMBEDDING:
            continue
        like = (unit.kind, unit.active_bytes_by_type, unit.active_weights, unit.num_matmuls)
        if like not in known:
            columns = logits if unit.kind is UnitKind.OUTPUT else tokens
            known[like] = _unit_seconds(shape, unit, rates, settings.threads, columns)
        seconds += known[like]
        if unit.kind is UnitKind.EXPERTS:
            experts_s += known[like]
        if unit.kind is UnitKind.ATTENTION and unit.layer is not None:
            cache = (
                *(shape.kv_bytes_per_layer[unit.layer], shape.head_length(unit.layer)),
                *(shape.kv.of_layer(unit.layer, shape.block_count), shape.kv.is_chosen_from(unit.layer)),
            )
            if cache not in known:
                known[cache] = _attention_seconds(shape, rates, settings.threads, (unit.layer, tokens, depth))
            seconds += known[cache]
    return seconds, experts_s


def _unit_seconds(shape: ModelShape, unit: Unit, rates: Cpu | Gpu, threads: int, tokens: int) -> float:
    share, scale = unit_cost.dense(tokens), 1.0
    if unit.kind is UnitKind.EXPERTS and shape.expert_count:
        probability = shape.expert_used_count / shape.expert_count
        share, scale = unit_cost.experts(tokens, probability), 1 / probability if probability else 0.0
    if isinstance(rates, Cpu):
        by_type = unit_cost.bytes_by_type(unit, scale)
        return unit_cost.cpu_seconds(rates, threads, by_type, share, unit.num_matmuls)
    sizes = scale * unit.active_bytes, scale * unit.active_weights
    return unit_cost.gpu_seconds(rates, *sizes, share, unit.num_matmuls)


def _attention_seconds(shape: ModelShape, rates: Cpu | Gpu, threads: int, step: tuple[int, int, int]) -> float:
    """`step`: layer, tokens, depth."""
    if isinstance(rates, Cpu):
        return unit_cost.cpu_attention_seconds(rates, threads, shape, *step)
    return unit_cost.gpu_attention_seconds(rates, shape, *step)
