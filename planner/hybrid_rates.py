"""Which experts pay to be brought to the GPU for one step: the rates that decide it, and what is then computed where.

Knows nothing about how experts are brought. Rates are bytes or operations a second; a multiply-add is two.
"""

import numpy as np

from offload.expert_rates import ExpertRates
from offload.expert_schedule import misses_to_move, moving_saves_s, schedule_experts
from planner import unit_cost
from planner.machine import Machine
from planner.model_shape import ModelShape, Unit, UnitKind
from planner.streamed import read_bytes_per_s

READ_BYTES_PER_S = 4e9  # of raw experts, from the file in the page cache to pinned memory: not yet measured apart
MANY_TOKENS = 128


def expert_rates(shape: ModelShape, machine: Machine, threads: int, *, streams: bool = False) -> ExpertRates | None:
    """The rates of a machine for a model's experts; None without a GPU or experts. `streams`: RAM lacks some."""
    unit = next((unit for unit in shape.units if unit.kind is UnitKind.EXPERTS), None)
    gpu = machine.gpu
    if unit is None or gpu is None or not shape.expert_count:
        return None
    one, many = (_cpu_seconds(machine, threads, unit, tokens) for tokens in (1, MANY_TOKENS))
    return ExpertRates(
        cpu_bytes_per_s=unit.active_bytes / one,
        cpu_flops_per_s=2 * MANY_TOKENS * unit.active_weights / many,
        gpu_bytes_per_s=gpu.read_bytes_per_s,
        gpu_flops_per_s=gpu.flops_per_s,
        move_bytes_per_s=min(gpu.link_to_bytes_per_s, READ_BYTES_PER_S),
        launch_s=gpu.launch_s,
        read_bytes_per_s=read_bytes_per_s(shape, machine.flash) if streams and machine.flash is not None else None,
    )


def moved_share(
    shape: ModelShape,
    rates: ExpertRates,
    unit: Unit,
    *,
    tokens: int,
    hits: float,
    places: int,
    lacking: float | None = None,
) -> float:
    """Of the experts that a step's tokens use in a layer, those that are brought; `places` at most. Evenly used.

    `lacking`: those that are to be read from flash; None where RAM has all.
    """
    count, used = shape.expert_count, max(shape.expert_used_count, 1)
    if not places:
        return 0.0
    if tokens == 1 and lacking is not None:
        return 0.0  # the drive brings as much for either device, and what it brings to RAM stays there
    times = rates.times(unit.num_bytes / count, unit.num_weights / count)
    if tokens == 1 and moving_saves_s(used, times) <= 0:
        return 0.0
    if tokens == 1:
        missing = used * (1 - hits)
        return min(misses_to_move(round(missing), rates.move_bytes_per_s, rates.cpu_bytes_per_s), places) / used
    touched = max(round(count * unit_cost.experts(tokens, used / count).bytes), 1)
    each = max(round(tokens * used / touched), 1)
    there = round(hits * touched)
    index = np.arange(touched)
    in_ram = None if lacking is None else index < round((1 - lacking) * touched)
    split = schedule_experts(np.full(touched, each), index < there, times, in_ram)
    return min(len(split.moved), places) / touched


def _cpu_seconds(machine: Machine, threads: int, unit: Unit, tokens: int) -> float:
    """Of an expert's active bytes, each by so many tokens."""
    by_type = unit_cost.bytes_by_type(unit, 1.0)
    return unit_cost.cpu_seconds(machine.cpu, threads, by_type, unit_cost.Share(1.0, tokens), 0, part=0)
