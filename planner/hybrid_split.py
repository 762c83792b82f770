"""Which parts of a model are the GPU's: what a hybrid plan's placements say, in terms of layers.

Knows nothing about sizes or how a split is found.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from offload.tiers import Device
from planner.hybrid_parts import Part, parts
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Placement


@dataclass(frozen=True, slots=True)
class Split:
    """Layers whose attention, with its KV cache, and whose feed-forward but for routed experts are the GPU's.

    `resident` are layers of `feed_forward` all of whose experts lie in the GPU's memory and nowhere else; `slots`
    count those and the places that experts of the other ones share, of which RAM has all. `kv_tokens`: that the GPU
    holds of each cache at most, older ones being in RAM; None: all.
    """

    attention: frozenset[int] = frozenset()
    feed_forward: frozenset[int] = frozenset()
    output: bool = False
    resident: frozenset[int] = frozenset()
    slots: int = 0
    kv_tokens: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the CPU computes everything."""
        return not (self.attention or self.feed_forward or self.output)

    def device(self, part: Part) -> Device:
        """What computes a part; of experts, what holds all of them."""
        if part.kind is UnitKind.OUTPUT:
            here = self.output
        elif part.kind is UnitKind.ATTENTION:
            here = part.layer in self.attention
        elif part.kind is UnitKind.EXPERTS:
            here = part.layer in self.resident
        else:
            here = part.feeds and part.layer in self.feed_forward
        return Device.GPU if here else Device.CPU

    def cached_layers(self, shape: ModelShape) -> frozenset[int]:
        """Layers whose experts may have slots on the GPU, and are in RAM too."""
        routed = {unit.layer for unit in shape.units if unit.kind is UnitKind.EXPERTS and unit.layer is not None}
        return frozenset(routed & self.feed_forward) - self.resident

    def cache_slots(self, shape: ModelShape) -> int:
        """Slots that experts share."""
        return self.slots - len(self.resident) * shape.expert_count

    def seeds(self, shape: ModelShape) -> tuple[tuple[int, int], ...]:
        """(layer, expert) that slots are filled with at first: all of resident layers, then as many of each layer.

        Which experts are used most nobody knows before a run: the cache finds out.
        """
        return tuple(islice(self._seeds(shape), self.slots))

    def _seeds(self, shape: ModelShape) -> Iterator[tuple[int, int]]:
        yield from ((layer, expert) for layer in sorted(self.resident) for expert in range(shape.expert_count))
        layers = sorted(self.cached_layers(shape))
        yield from ((layer, expert) for expert in range(shape.expert_count) for layer in layers)


def split_of(
    shape: ModelShape, placements: Iterable[Placement], gpu_slots: int, gpu_kv_tokens: int | None = None
) -> Split:
    """The split that a plan's placements and settings name."""
    where = {placement.unit: placement.device for placement in placements}
    names = (part.name for part in parts(shape) if where.get(part.name) is Device.GPU)
    return replace(split_by_names(shape, names, gpu_slots), kv_tokens=gpu_kv_tokens)


def split_by_names(shape: ModelShape, on_gpu: Iterable[str], gpu_slots: int) -> Split:
    """The split in which the parts of these names are the GPU's; ValueError for one that never is."""
    names = frozenset(on_gpu)
    here = [part for part in parts(shape) if part.name in names]
    return Split(
        attention=frozenset(part.layer for part in here if part.kind is UnitKind.ATTENTION and part.layer is not None),
        feed_forward=frozenset(part.layer for part in here if part.feeds and part.layer is not None),
        output=any(part.kind is UnitKind.OUTPUT for part in here),
        resident=frozenset(part.layer for part in here if part.kind is UnitKind.EXPERTS and part.layer is not None),
        slots=gpu_slots,
    )
