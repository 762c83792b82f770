"""Experts of a hybrid plan that neither memory holds: how many a step lacks, and how fast they come from flash.

The two caches complement each other: RAM's sees only what the GPU does not compute, so that what both hold together
counts, as if it were one cache (of an expert that goes to the GPU the copy in RAM is soon given up, as nobody uses it).
Knows nothing about who computes what. Rates are bytes a second.
"""

from dataclasses import dataclass

from planner.hit_curve import HitCurve
from planner.hybrid_items import FlashLoads
from planner.hybrid_split import Split
from planner.machine import Flash, Machine
from planner.model_shape import ModelShape
from planner.streamed import PACK_BYTES_PER_S, num_layers, read_bytes_per_s, slot_bytes


@dataclass(frozen=True, slots=True)
class FlashExperts:
    """`slots` places in RAM; `curve`: hits by places, all layers' experts together; `bytes_per_s`: of what is read."""

    slots: int
    curve: HitCurve
    bytes_per_s: float

    def lacking(self, shape: ModelShape, split: Split, layer: int | None, tokens: int) -> float:
        """Of the experts that a step's tokens use in a layer, those that neither memory holds."""
        if layer in split.resident:
            return 0.0
        layers, cached = num_layers(shape), split.cached_layers(shape)
        places = self.slots / max(layers - len(split.resident), 1)
        if layer in cached:
            places += split.cache_slots(shape) / len(cached)
        share = min(places / shape.expert_count, 1.0)
        return 1 - found_share(shape, self.curve.hit_rate(share * self.curve.slots[-1]), share, tokens)


def found_share(shape: ModelShape, of_one: float, share: float, tokens: int) -> float:
    """What a step finds of the experts it uses: between one token, whose experts a good policy foresees, and all
    experts, of which the places' share is there.
    """
    first = shape.expert_used_count / shape.expert_count
    spread = (1 - (1 - first) ** tokens - first) / max(1 - first, 1e-9)
    return of_one + (share - of_one) * spread


def arriving_bytes_per_s(shape: ModelShape, flash: Flash, threads: int) -> float:
    """At which experts come to RAM: read, and packed for the CPU's kernels."""
    return min(read_bytes_per_s(shape, flash), PACK_BYTES_PER_S * threads)


def flash_loads(shape: ModelShape, machine: Machine, threads: int) -> FlashLoads | None:
    """How experts that RAM lacks come there; None where the drive is not known."""
    if machine.flash is None:
        return None
    return FlashLoads(arriving_bytes_per_s(shape, machine.flash, threads), slot_bytes(shape))
