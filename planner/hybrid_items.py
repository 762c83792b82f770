"""What the hybrid executor can do with a model as a placement problem: parts on the GPU or on the CPU, and experts.

Experts go to the GPU, as slots of its memory, in classes of popularity, and only where what else their layer's
feed-forward has is the GPU's: that is not in the problem, `repaired` sees to it. RAM holds the experts all the same,
since slots change hands; where it cannot, whole layers of experts may lie on the GPU alone, or RAM and the GPU hold
some each and the others are read from flash. Dense weights are never loaded step by step: the link reads them from the
same RAM as the CPU, and no faster.
Knows nothing about how a problem is solved.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload.tiers import Device, Tier
from planner import unit_cost
from planner.hybrid_memory import kv_tokens, ram_kv_tokens
from planner.hybrid_parts import FEED_FORWARD, Part, StepCosts, part_option, parts, ram_bytes, split_option
from planner.items import THROUGHPUT_SEQUENCES, expert_classes
from planner.machine import Machine
from planner.model_shape import ModelShape, UnitKind
from planner.placement import Assignment, Item, PlacementProblem
from planner.plan import Objective


@dataclass(frozen=True, slots=True)
class FlashLoads:
    """Experts that RAM lacks: how fast they come to it, to be computed with there, and what a place for one takes."""

    bytes_per_s: float
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class HybridProblem:
    """A placement problem, with what it leaves out: experts follow the rest of their layer's feed-forward."""

    problem: PlacementProblem
    divides: bool  # experts by classes, of which RAM has copies
    gpu_is_ram: bool = False  # where the GPU is simulated: what lies on it takes RAM as well

    def gpu_bytes_left(self, assignment: Assignment) -> int:
        """What of the GPU's memory an assignment leaves for more."""
        ram, gpu = self.problem.held_bytes(assignment)
        left = self.problem.gpu_bytes - gpu
        return min(left, self.problem.ram_bytes - ram) if self.gpu_is_ram else left

    def repaired(self, assignment: Assignment) -> Assignment:
        """`assignment` without experts on the GPU in layers whose other feed-forward is the CPU's."""
        feeding = self._layers(assignment, routed=False)
        return tuple(
            0 if item.routed and item.layer not in feeding else index
            for item, index in zip(self.problem.items, assignment, strict=True)
        )

    def completed(self, assignment: Assignment) -> Assignment:
        """`assignment` with the other feed-forward of layers that have experts on the GPU there too, if it may be.

        For that the experts make room that save least for their bytes.
        """
        items, layers = self.problem.items, self._layers(assignment, routed=True)
        moved = tuple(
            len(item.options) - 1 if self._feeds(item) and item.layer in layers else index
            for item, index in zip(items, assignment, strict=True)
        )
        chosen = list(self.repaired(moved))
        least_first = sorted(
            (index for index, item in enumerate(items) if item.routed and chosen[index]), key=self._worth
        )
        for index in least_first:
            if self.problem.fits(tuple(chosen)):
                break
            chosen[index] = 0
        return self.repaired(tuple(chosen))

    def _worth(self, index: int) -> float:
        """Seconds that a byte of the GPU's memory saves when it holds this item."""
        options = self.problem.items[index].options
        first, last = options[0], options[-1]
        return (first.compute_s + first.load_s - last.compute_s) / max(last.gpu_bytes, 1)

    def _layers(self, assignment: Assignment, *, routed: bool) -> set[int | None]:
        """Layers with experts on the GPU, or with their other feed-forward there."""
        return {
            item.layer
            for item, option in zip(self.problem.items, self.problem.chosen(assignment), strict=True)
            if option.device is Device.GPU and (item.routed if routed else self._feeds(item))
        }

    @staticmethod
    def _feeds(item: Item) -> bool:
        """Whether an item is what else a layer's feed-forward has."""
        return not item.routed and item.kind in FEED_FORWARD


def hybrid_problem(
    shape: ModelShape,
    machine: Machine,
    *,
    threads: int,
    context_tokens: int,
    chunk_tokens: int,
    objective: Objective,
    ram_bytes: int,
    gpu_bytes: int,
    divides: bool,
    gpu_is_ram: bool = False,
    flash: FlashLoads | None = None,
    gpu_kv_tokens: int | None = None,
    cold_byte_s: float | None = None,
) -> HybridProblem:
    """The problem for the step that the objective looks at; the CPU is each item's first option.

    With `flash` RAM need not hold experts: what neither it nor the GPU holds is read from there when it is used.
    `gpu_kv_tokens`: that the GPU holds of a cache, the others being in RAM; None: all. `cold_byte_s`: what a byte of
    those costs for lying on flash in part, room in RAM for the rest being set aside; None: RAM has all.
    """
    many = objective is Objective.THROUGHPUT
    tokens = {Objective.LATENCY: 1, Objective.TTFT: chunk_tokens}.get(objective, THROUGHPUT_SEQUENCES)
    depth = 0 if objective is Objective.TTFT else context_tokens // 2
    costs = StepCosts(shape, machine, threads, tokens, depth, tokens if many else 1, gpu_kv_tokens, cold_byte_s)
    items = [item for part in parts(shape) for item in _items(shape, costs, part, context_tokens, divides, flash)]
    if gpu_is_ram:
        items = [_in_ram(item) for item in items]
    return HybridProblem(PlacementProblem(tuple(items), ram_bytes, gpu_bytes, costs.handover_s()), divides, gpu_is_ram)


def _items(
    shape: ModelShape, costs: StepCosts, part: Part, context_tokens: int, divides: bool, flash: FlashLoads | None
) -> Iterator[Item]:
    if part.kind is UnitKind.EXPERTS and shape.expert_count:
        yield from _expert_items(shape, costs, part, divides, flash)
        return
    held, kv_bytes = sum(map(ram_bytes, part.units)), part.kv_bytes if costs.cold_byte_s is None else 0
    options = [
        part_option(Device.CPU, costs.part(part, Device.CPU), ram_bytes=held + kv_bytes * context_tokens, gpu_bytes=0)
    ]
    if part.may_be_on_gpu:
        on_gpu = part.gpu_bytes + part.kv_bytes * kv_tokens(context_tokens, costs.kv_tokens)
        others = kv_bytes * ram_kv_tokens(context_tokens, costs.kv_tokens)
        options.append(part_option(Device.GPU, costs.part(part, Device.GPU), ram_bytes=others, gpu_bytes=on_gpu))
    yield Item(part.name, part.kind, part.layer, tuple(options))


def _expert_items(
    shape: ModelShape, costs: StepCosts, part: Part, divides: bool, flash: FlashLoads | None
) -> Iterator[Item]:
    """Classes of a layer's experts with slots for each; undivided, all of them on one side, with no copy in RAM."""
    unit, count, used = part.units[0], shape.expert_count, max(shape.expert_used_count, 1)
    classes = expert_classes(count, used) if divides else ((count, used / count),)
    yield Item(f"{unit.name}#split", UnitKind.OTHER, part.layer, (split_option(),))
    for number, (experts, probability) in enumerate(classes):
        share = unit_cost.experts(costs.tokens, probability)
        fraction, active = experts / count, experts / used
        terms = {
            device: costs.experts(unit, device, share, active=active, fraction=fraction)
            for device in (Device.CPU, Device.GPU)
        }
        in_ram = int(fraction * ram_bytes(unit)) if flash is None else experts * flash.slot_bytes
        options = [part_option(Device.CPU, terms[Device.CPU], ram_bytes=in_ram, gpu_bytes=0)]
        if flash is not None:
            loaded = active * share.bytes * unit.active_bytes
            away = part_option(Device.CPU, terms[Device.CPU])
            read = replace(away, tier=Tier.FLASH, load_s=loaded / flash.bytes_per_s, load_bytes=int(loaded))
            options.insert(0, read)
        if part.may_be_on_gpu:
            on_gpu = int(fraction * unit.num_bytes)
            kept = in_ram if divides and flash is None else 0
            options.append(part_option(Device.GPU, terms[Device.GPU], ram_bytes=kept, gpu_bytes=on_gpu))
        yield Item(f"{unit.name}#{number}", UnitKind.EXPERTS, part.layer, tuple(options), routed=True)


def _in_ram(item: Item) -> Item:
    options = (replace(option, ram_bytes=option.ram_bytes + option.gpu_bytes) for option in item.options)
    return replace(item, options=tuple(options))
