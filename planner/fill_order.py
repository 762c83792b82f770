"""llama.cpp's way to fill a GPU: whole layers from the last one on, or all layers but the experts of the first ones.

The best of its settings, as a user finds it by trial: `-ngl` from none to all, then all layers with `--n-cpu-moe` from
all to none. What RAM does not hold stays on flash, first layers first, as a mapped file does. For comparison.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from offload.tiers import Device, Tier
from planner.least_time import LeastTime
from planner.model_shape import UnitKind
from planner.placement import Assignment, Item, PlacementProblem
from planner.simulate import step_seconds

OnGpu = Callable[[Item], bool]


@dataclass(frozen=True, slots=True)
class _Ways:
    """The options of an item that llama.cpp has, by number: on the GPU, in RAM, on flash."""

    item: Item
    gpu: int | None
    ram: int | None
    flash: int | None


def solve_fill_order(problem: PlacementProblem, *, below_s: float = math.inf) -> Assignment | None:
    """The quickest of llama.cpp's placements that fit; None where none does, or none can take less than `below_s`."""
    every = [_ways(item) for item in problem.items]
    found = (_fill(problem, every, on_gpu) for on_gpu in _settings(problem))
    fitting = dict.fromkeys(assignment for assignment in found if assignment is not None)
    least = LeastTime(problem)
    best: tuple[float, Assignment] | None = None
    for bound, assignment in sorted((least.seconds(assignment), assignment) for assignment in fitting):
        if bound >= below_s or (best is not None and bound > best[0]):
            break  # so can be no better
        timed = step_seconds(problem, assignment), assignment
        best = timed if best is None else min(best, timed)
    return best[1] if best is not None else None


def _ways(item: Item) -> _Ways:
    places = {(option.tier, option.device): index for index, option in enumerate(item.options)}
    gpu, ram, flash = (Tier.GPU, Device.GPU), (Tier.RAM, Device.CPU), (Tier.FLASH, Device.CPU)
    return _Ways(item, places.get(gpu), places.get(ram), places.get(flash))


def _settings(problem: PlacementProblem) -> Iterator[OnGpu]:
    layers = 1 + max((item.layer for item in problem.items if item.layer is not None), default=-1)
    yield lambda item: False
    for first in range(layers, -1, -1):
        yield lambda item, first=first: _after(item, first)  # type: ignore[misc]
    for last in range(layers, 0, -1):
        yield lambda item, last=last: _after(item, last) or (_after(item, 0) and item.kind is not UnitKind.EXPERTS)  # type: ignore[misc]


def _after(item: Item, first: int) -> bool:
    """Whether an item is of layer `first` or later, or the output head."""
    return item.kind is UnitKind.OUTPUT if item.layer is None else item.layer >= first


def _fill(problem: PlacementProblem, every: list[_Ways], on_gpu: OnGpu) -> Assignment | None:
    """The placement of a setting: RAM is filled from the last item to the first. None where it does not fit."""
    chosen: list[int] = []
    ram = gpu = 0
    for ways in every:
        index = ways.gpu if ways.gpu is not None and on_gpu(ways.item) else ways.ram
        if index is None:
            return None
        chosen.append(index)
        ram, gpu = ram + ways.item.options[index].ram_bytes, gpu + ways.item.options[index].gpu_bytes
        if gpu > problem.gpu_bytes:
            return None
    for position, ways in enumerate(every):
        if ram <= problem.ram_bytes:
            break
        if ways.flash is not None and chosen[position] == ways.ram:
            ram += ways.item.options[ways.flash].ram_bytes - ways.item.options[ways.ram].ram_bytes
            chosen[position] = ways.flash
    return tuple(chosen) if ram <= problem.ram_bytes else None
