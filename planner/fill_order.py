"""llama.cpp's way to fill a GPU: whole layers from the last one on, or all layers but the experts of the first ones.

The best of its settings, as a user finds it by trial: `-ngl` from none to all, then all layers with `--n-cpu-moe` from
all to none. What RAM does not hold stays on flash, first layers first, as a mapped file does. For comparison.
"""

from collections.abc import Callable, Iterator

from offload.tiers import Device, Tier
from planner.model_shape import UnitKind
from planner.placement import Assignment, Item, PlacementProblem
from planner.simulate import step_seconds

OnGpu = Callable[[Item], bool]


def solve_fill_order(problem: PlacementProblem) -> Assignment | None:
    """The quickest of llama.cpp's placements that fit; None where none does."""
    found = [_fill(problem, on_gpu) for on_gpu in _settings(problem)]
    fitting = dict.fromkeys(assignment for assignment in found if assignment is not None)
    return min(fitting, key=lambda assignment: (step_seconds(problem, assignment), assignment), default=None)


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


def _fill(problem: PlacementProblem, on_gpu: OnGpu) -> Assignment | None:
    """The placement of a setting: RAM is filled from the last item to the first."""
    chosen = [0] * len(problem.items)
    ram = gpu = 0
    flash: dict[int, int] = {}
    for position in reversed(range(len(problem.items))):
        item = problem.items[position]
        places = {(option.tier, option.device): index for index, option in enumerate(item.options)}
        wanted = (Tier.GPU, Device.GPU) if on_gpu(item) else (Tier.RAM, Device.CPU)
        index = places.get(wanted, places.get((Tier.RAM, Device.CPU)))
        if index is None:
            return None
        if (on_flash := places.get((Tier.FLASH, Device.CPU))) is not None and wanted[0] is Tier.RAM:
            flash[position] = on_flash
        chosen[position] = index
        ram, gpu = ram + item.options[index].ram_bytes, gpu + item.options[index].gpu_bytes
    for position in sorted(flash):
        if ram <= problem.ram_bytes:
            break
        options = problem.items[position].options
        ram += options[flash[position]].ram_bytes - options[chosen[position]].ram_bytes
        chosen[position] = flash[position]
    return tuple(chosen) if problem.fits(tuple(chosen)) else None
