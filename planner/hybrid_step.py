"""One step of a hybrid plan as it will run: its parts and experts where the plan puts them, as a schedule's problem.

What experts find a slot on the GPU is expected, by a hit curve; of those that do not, the CPU computes what it can
while as many others cross the link as pay. Knows nothing about how a plan is found. Times are seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload.expert_rates import ExpertRates
from offload.tiers import Device, Tier
from planner import unit_cost
from planner.hit_curve import HitCurve
from planner.hybrid_draws import spread_hits
from planner.hybrid_flash import FlashExperts, found_share
from planner.hybrid_parts import Part, StepCosts, part_option, parts, split_option, step_option
from planner.hybrid_rates import moved_share
from planner.hybrid_split import Split
from planner.machine import Machine
from planner.model_shape import ModelShape, Unit, UnitKind
from planner.placement import Assignment, Item, PlacementProblem
from planner.unit_cost import Share, Terms

_ONE_OPTION = 0


@dataclass(frozen=True, slots=True)
class HybridRun:
    """A model split between the devices of a machine; `curve`: hits by slots, all layers' experts together."""

    shape: ModelShape
    machine: Machine
    threads: int
    split: Split
    curve: HitCurve | None = None
    rates: ExpertRates | None = None  # by which experts are brought for a step, to one of `places`
    places: int = 0
    flash: FlashExperts | None = None  # where RAM does not hold all experts

    def hit_rate(self, tokens: int) -> float:
        """Of the experts that a step's tokens use in layers with slots, how many have one: the bytes' share."""
        cached = len(self.split.cached_layers(self.shape))
        if not cached or self.curve is None:
            return 0.0
        every = cached * self.shape.expert_count
        slots = self.split.cache_slots(self.shape)
        one = self.curve.hit_rate(slots * self.curve.slots[-1] / every)
        return found_share(self.shape, one, slots / every, tokens)

    def step(self, *, tokens: int, depth: int, sequences: int = 1) -> tuple[PlacementProblem, Assignment]:
        """A step of `tokens` tokens behind `depth` others as a problem without a choice, and its assignment."""
        kept = self.split.kv_tokens
        costs = StepCosts(self.shape, self.machine, self.threads, tokens, depth, sequences, kept)
        routed = self.split.cached_layers(self.shape) | self.split.resident
        host = Item("step", UnitKind.OTHER, None, (step_option(len(routed)),))
        items = (host, *(item for part in parts(self.shape) for item in self._items(costs, part)))
        problem = PlacementProblem(items, ram_bytes=0, gpu_bytes=0, handover_s=costs.handover_s())
        return problem, (_ONE_OPTION,) * len(items)

    def _items(self, costs: StepCosts, part: Part) -> Iterator[Item]:
        if part.kind is UnitKind.EXPERTS and self.shape.expert_count:
            yield from self._experts(costs, part)
        else:
            device = self.split.device(part)
            yield Item(part.name, part.kind, part.layer, (part_option(device, costs.part(part, device)),))

    def _experts(self, costs: StepCosts, part: Part) -> Iterator[Item]:
        """A layer's experts: all of them on one device, or those with a slot, those that move, and the rest."""
        unit, lacking = part.units[0], 0.0
        if self.flash is not None:
            lacking = self.flash.lacking(self.shape, self.split, part.layer, costs.tokens)
        if part.layer not in self.split.feed_forward:
            yield from self._on_cpu(costs, unit, 1.0, lacking)
            return
        hits = 1.0 if part.layer in self.split.resident else self._hits(costs, part.units[0].layer or 0)
        moved, chooses = 0.0, False
        if self.rates is not None and self.places and hits < 1:
            moved = moved_share(
                *(self.shape, self.rates, unit),
                tokens=costs.tokens,
                hits=hits,
                places=self.places,
                lacking=None if self.flash is None else lacking,
            )
            chooses = moved > 0 or costs.tokens > 1
        yield Item(f"{unit.name}#split", UnitKind.OTHER, part.layer, (split_option(chooses=chooses),))
        if hits > 0:
            yield _item(unit, "#slots", Device.GPU, self._terms(costs, unit, Device.GPU, hits))
        if moved > 0 and self.rates is not None:
            terms, num_bytes = self._terms(costs, unit, Device.GPU, moved), self._bytes(unit, costs, moved)
            read_s = 0.0 if self.rates.read_bytes_per_s is None else num_bytes / self.rates.read_bytes_per_s
            yield _moved_item(unit, terms, num_bytes / self.rates.move_bytes_per_s, num_bytes, read_s=read_s)
        if (others := 1 - hits - moved) > 0:
            yield from self._on_cpu(costs, unit, others, max(lacking - moved, 0.0))

    def _on_cpu(self, costs: StepCosts, unit: Unit, part: float, lacking: float) -> Iterator[Item]:
        """That part of the experts; `lacking` of it (of all) comes from flash, while the others are computed."""
        lacking = min(lacking, part)
        if part - lacking > 0:
            yield _item(unit, "#others", Device.CPU, self._terms(costs, unit, Device.CPU, part - lacking))
        if lacking > 0 and self.flash is not None:
            option = part_option(Device.CPU, self._terms(costs, unit, Device.CPU, lacking))
            num_bytes = self._bytes(unit, costs, lacking)
            read = replace(
                option, tier=Tier.FLASH, load_s=num_bytes / self.flash.bytes_per_s, load_bytes=int(num_bytes)
            )
            yield Item(f"{unit.name}#read", UnitKind.EXPERTS, unit.layer, (read,), routed=True)

    def _hits(self, costs: StepCosts, layer: int) -> float:
        """Of the experts that a layer uses; of one token's, as many as chance has it there."""
        rate = self.hit_rate(costs.tokens)
        if costs.tokens > 1:
            return rate
        layers = sorted(self.split.cached_layers(self.shape))
        used = max(self.shape.expert_used_count, 1)
        return spread_hits(used, rate, len(layers))[layers.index(layer)] / used

    def _bytes(self, unit: Unit, costs: StepCosts, part: float) -> float:
        """Of that part of the experts that the tokens use."""
        count, used = self.shape.expert_count, max(self.shape.expert_used_count, 1)
        return part * unit.num_bytes * unit_cost.experts(costs.tokens, used / count).bytes

    def _terms(self, costs: StepCosts, unit: Unit, device: Device, part: float) -> Terms:
        """Of that part of the experts that the tokens use."""
        count, used = self.shape.expert_count, max(self.shape.expert_used_count, 1)
        share: Share = unit_cost.experts(costs.tokens, used / count)
        return costs.experts(unit, device, share, active=part * count / used, fraction=1.0)


def _moved_item(unit: Unit, terms: Terms, link_s: float, num_bytes: float, *, read_s: float) -> Item:
    """Experts that are brought for the step, once the host has chosen them; `read_s`: from flash before."""
    option = part_option(Device.GPU, terms)
    moving = replace(option, tier=Tier.RAM, load_s=link_s, load_bytes=int(num_bytes))
    if read_s > 0:
        moving = replace(moving, tier=Tier.FLASH, load_s=read_s + link_s, link_s=link_s)
    return Item(f"{unit.name}#moved", UnitKind.EXPERTS, unit.layer, (moving,), routed=True)


def _item(unit: Unit, suffix: str, device: Device, terms: Terms) -> Item:
    return Item(f"{unit.name}{suffix}", UnitKind.EXPERTS, unit.layer, (part_option(device, terms),), routed=True)
