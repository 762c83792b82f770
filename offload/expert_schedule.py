"""Who computes which of a layer's experts, CPU or GPU, and which ones are copied to the GPU for it.

Two rules: HybriMoE's schedule (arXiv:2504.05897) for a layer whose experts have many tokens, and a split of the misses
by bandwidth alone, for every layer of every decoded token. Knows nothing of tensors, files or devices: times are what
was measured, given by the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

from offload.expert_rates import ExpertTimes

IMPROVED_EXPERTS = 16  # of more, one misplaced matters little, and all exchanges of two take milliseconds to try
CHOOSING_S = 2e-4  # until copies were chosen and begun, and it is known that they have ended

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ExpertSplit:
    """Indices of experts in the order in which a device computes them; of the GPU's, `moved` are copied, in order."""

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    moved: tuple[int, ...]
    makespan_s: float


def schedule_experts(
    tokens: Sequence[int] | NDArray[np.int64],
    on_gpu: Sequence[bool] | Flags,
    times: ExpertTimes,
    in_ram: Sequence[bool] | Flags | None = None,
) -> ExpertSplit:
    """A split of one layer's experts, of which `on_gpu` need no copy; ValueError where the lengths differ.

    Where some must be read, the CPU need not read those that are `in_ram` (None: all), while every copy to the GPU is
    read; the drive serves both so that their reads end together.

    HybriMoE's list has the GPU's own experts by falling tokens, then the others likewise; the GPU takes from its head,
    the CPU from its tail, whoever would be done earlier with what it takes. Alone that is up to twice the optimum for
    few experts (one of many tokens that the GPU lacks always goes to the CPU first). So this begins with it and with
    the GPU taking those that take the CPU longest, and goes on from both, as long as moving one expert or exchanging
    two gains. 128 experts take 0.05 ms (AMD EPYC, family 26).
    """
    from cpu_kernels import two_devices  # noqa: PLC0415 - brings numba

    counts, there = np.asarray(tokens, np.int64), np.asarray(on_gpu, np.bool_)
    ram = np.ones(len(counts), np.bool_) if in_ram is None else np.asarray(in_ram, np.bool_)
    if not len(counts) == len(there) == len(ram):
        raise ValueError(f"{len(counts)} experts, and {len(there)} places of experts")
    order = np.lexsort((-counts, ram, ~there))
    counts, there, ram = counts[order], there[order], ram[order]
    costs = np.stack([times.gpu.seconds(counts), times.cpu.seconds(counts), np.where(there, 0.0, times.move_s)])
    longest = np.argsort(-(costs[1] + np.where(ram, 0.0, times.read_s)), kind="stable")
    from_ends, beginning = np.zeros((2, len(counts)), np.bool_)
    two_devices.from_both_ends(from_ends, costs)
    two_devices.best_beginning(beginning, longest, costs, ram, times.read_s)
    if len(counts) <= IMPROVED_EXPERTS:
        two_devices.improve(from_ends, costs, ram, times.read_s)
        two_devices.improve(beginning, costs, ram, times.read_s)
    best_s, of_ends_s = (
        two_devices.makespan(beginning, costs, ram, times.read_s),
        two_devices.makespan(from_ends, costs, ram, times.read_s),
    )
    is_gpus = beginning
    if of_ends_s < best_s:
        best_s, is_gpus = of_ends_s, from_ends
    gpu, cpu, moved = order[is_gpus], order[~is_gpus][::-1], order[is_gpus & ~there]
    return ExpertSplit(tuple(gpu.tolist()), tuple(cpu.tolist()), tuple(moved.tolist()), best_s)


def misses_to_move(misses: int, link_bytes_per_s: float, cpu_bytes_per_s: float) -> int:
    """Of so many experts that are not on the GPU, with a token each: how many to copy there; the CPU computes the rest.

    Both rates measured while the other one is in use. A copy takes in proportion to 1 - r and a computation on the CPU
    to r = link / (link + cpu), so that both end together near misses * r copies: the better of the two whole numbers.
    """
    if misses < 0 or link_bytes_per_s < 0 or cpu_bytes_per_s <= 0:
        raise ValueError(f"{misses} misses, {link_bytes_per_s} and {cpu_bytes_per_s} bytes per second")
    share = link_bytes_per_s / (link_bytes_per_s + cpu_bytes_per_s)
    low = min(floor(misses * share), misses)
    return min((low, min(low + 1, misses)), key=lambda moved: max(moved * (1 - share), (misses - moved) * share))


def moving_saves_s(misses: int, times: ExpertTimes) -> float:
    """What copies of the best number of so many missing experts, with a token each, save of a layer.

    CHOOSING_S is taken off, which every layer takes where that is asked at all.
    """
    cpu_s, move_s = float(times.cpu.seconds(1)), times.move_s
    best_s = min(max(moved * move_s, (misses - moved) * cpu_s) for moved in range(misses + 1))
    return misses * cpu_s - best_s - CHOOSING_S
