"""The placement problem: parts of a model, each with the ways it could be held and computed, and memories to share.

What a solver sees. Knows nothing about models or devices: times and bytes are given. An *assignment* names one option
for every item, in the order of the items, which is the order a token meets them in.
"""

from dataclasses import dataclass

from offload.tiers import Device, Tier
from planner.model_shape import UnitKind
from planner.prediction import Bottleneck

Assignment = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to hold and compute an item, for one step of the phase the problem is about.

    `load_s` is time on the lane that brings `load_bytes` (expected, per step) to where it is computed: flash to RAM,
    RAM to GPU, or both ways in turn; 0 where the item is resident. `link_s` is the part of it that is spent on the
    link behind a read from flash. Buffers to load into are shared, and no part of the held bytes. `bound_by` takes most
    of `compute_s`.
    """

    tier: Tier
    device: Device
    compute_s: float
    load_s: float
    load_bytes: int
    ram_bytes: int
    gpu_bytes: int
    link_s: float = 0.0
    bound_by: Bottleneck = Bottleneck.COMPUTE


@dataclass(frozen=True, slots=True)
class Item:
    """A unit, or the part of a layer's experts that are equally popular."""

    name: str  # the unit's, with "#k" for the k-th class of its experts
    kind: UnitKind
    layer: int | None
    options: tuple[Option, ...]
    routed: bool = False  # whether its loads are known only when the layer's router has run


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """Items within memories. `handover_s` is paid by a device that goes on from another's work."""

    items: tuple[Item, ...]
    ram_bytes: int
    gpu_bytes: int
    handover_s: float

    def held_bytes(self, assignment: Assignment) -> tuple[int, int]:
        """(RAM, GPU) bytes that an assignment takes."""
        chosen = self.chosen(assignment)
        return sum(option.ram_bytes for option in chosen), sum(option.gpu_bytes for option in chosen)

    def fits(self, assignment: Assignment) -> bool:
        """Whether both memories hold it."""
        ram, gpu = self.held_bytes(assignment)
        return ram <= self.ram_bytes and gpu <= self.gpu_bytes

    def chosen(self, assignment: Assignment) -> list[Option]:
        """The option of each item."""
        return [item.options[index] for item, index in zip(self.items, assignment, strict=True)]
