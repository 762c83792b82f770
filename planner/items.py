"""A model on a machine as a placement problem: its units, KV caches and classes of experts, each with its options.

Costs are those of `planner.unit_cost` for the step an objective looks at: one token in the middle of the context, a
chunk of the prompt, or one token of many sequences. Knows nothing about how a problem is solved.

Invariant: buffers that loads need, from flash to RAM or to the GPU, are taken out of a memory before the problem is
stated, and shared by all that is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from cpu_kernels.kv_layout import PIECE_TOKENS
from offload.flash import READ_BYTES
from offload.kv_chunks import RING_BYTES
from offload.tiers import Device, Tier
from planner import unit_cost
from planner.kv_spill import LEAST_PIECES
from planner.machine import Machine
from planner.model_shape import ModelShape, Unit, UnitKind
from planner.placement import Item, Option, PlacementProblem
from planner.plan import Objective, Settings
from planner.schedule import LAYERS_AHEAD
from planner.unit_cost import Share, Terms

EXPERT_CLASSES = 8
# Popularity of experts by rank r goes as (r + 1) ** -POPULARITY_EXPONENT: assumed, until a trace of the model says.
POPULARITY_EXPONENT = 0.5
THROUGHPUT_SEQUENCES = 16  # that advance together when throughput is the objective

Places = frozenset[tuple[Tier, Device]]


@dataclass(frozen=True, slots=True)
class _Part:
    """What an item is of a unit: `fraction` of its bytes held, `active` of its active bytes read by `share`."""

    name: str
    kind: UnitKind
    layer: int | None
    fraction: float
    active: float
    share: Share
    routed: bool = False


def placement_problem(
    shape: ModelShape,
    machine: Machine,
    settings: Settings,
    *,
    objective: Objective,
    ram_bytes: int,
    gpu_bytes: int,
    tiers: Places,
    loads_dense: bool = True,
) -> PlacementProblem:
    """The problem of `shape` on those pairs of tier and device that `machine` has, within the bytes that are free.

    Flash is offered only where RAM cannot hold all, since nothing computes from it faster. `loads_dense`: whether the
    GPU may compute dense parts that do not lie there, too: buffers for the layers ahead are taken out of its memory.
    """
    maker = _Maker(shape, machine, settings, objective, loads_dense=loads_dense)
    places = {place for place in tiers if machine.gpu is not None or Device.GPU is not place[1]}
    places = {place for place in places if machine.flash is not None or Tier.FLASH is not place[0]}
    if maker.held_bytes <= ram_bytes:
        places = {place for place in places if place[0] is not Tier.FLASH}
    elif any(tier is Tier.FLASH for tier, _ in places):
        ram_bytes -= maker.buffer_bytes + RING_BYTES
    if any(device is Device.GPU and tier is not Tier.GPU for tier, device in places):
        gpu_bytes -= maker.gpu_buffer_bytes
    return PlacementProblem(
        items=tuple(maker.items(frozenset(places))),
        ram_bytes=ram_bytes,
        gpu_bytes=gpu_bytes,
        handover_s=machine.gpu.handover_s if machine.gpu else 0.0,
    )


def expert_classes(count: int, used: int) -> tuple[tuple[int, float], ...]:
    """(experts, probability that a token uses each of them) of classes of equal size, most popular first."""
    weights = [(rank + 1) ** -POPULARITY_EXPONENT for rank in range(count)]
    scale = used / sum(weights)
    number = min(EXPERT_CLASSES, count)
    bounds = [count * index // number for index in range(number + 1)]
    classes = []
    for first, end in pairwise(bounds):
        classes.append((end - first, min(scale * sum(weights[first:end]) / (end - first), 1.0)))
    return tuple(classes)


class _Maker:
    """Items of one model on one machine, for one objective's step."""

    def __init__(
        self, shape: ModelShape, machine: Machine, settings: Settings, objective: Objective, *, loads_dense: bool
    ) -> None:
        self._loads_dense = loads_dense
        self._shape, self._machine, self._settings = shape, machine, settings
        self._context = settings.context_tokens
        chunk = settings.prefill_chunk_tokens
        self._tokens = {Objective.LATENCY: 1, Objective.TTFT: chunk, Objective.THROUGHPUT: THROUGHPUT_SEQUENCES}[
            objective
        ]
        self._one_sequence = objective is not Objective.THROUGHPUT
        self._experts_used = max(shape.expert_used_count, 1)
        self._expert_classes = expert_classes(shape.expert_count, self._experts_used) if shape.expert_count else ()
        self._depth = 0 if objective is Objective.TTFT else self._context // 2

    @property
    def held_bytes(self) -> int:
        """All weights and the whole KV cache."""
        return self._shape.num_bytes + self._shape.kv_bytes_per_token * self._context

    @property
    def buffer_bytes(self) -> int:
        """What loads arrive in: the layers ahead and the one computed, of experts the active ones."""
        layers: dict[int | None, int] = {}
        for unit in self._shape.units:
            part = unit.active_bytes if unit.kind is UnitKind.EXPERTS else unit.num_bytes
            layers[unit.layer] = layers.get(unit.layer, 0) + part
        blocks = [size for layer, size in layers.items() if layer is not None]
        return (LAYERS_AHEAD + 1) * max(blocks, default=0) + layers.get(None, 0)

    @property
    def gpu_buffer_bytes(self) -> int:
        """What loads to the GPU arrive in: as from flash, or a layer's active experts, which no load is ahead of."""
        if self._loads_dense:
            return self.buffer_bytes
        return max((unit.active_bytes for unit in self._shape.units if unit.kind is UnitKind.EXPERTS), default=0)

    def items(self, places: Places) -> Iterator[Item]:
        """Every item in the order a token meets them, with its options in the order of tiers and devices."""
        known: dict[object, tuple[Option, ...]] = {}  # units of like layers have the same
        for unit in self._shape.units:
            like = unit.kind, unit.num_bytes, unit.active_bytes, unit.active_bytes_by_type, unit.num_matmuls
            for part in self._parts(unit):
                same = (*like, unit.active_weights, part.fraction, part.active, part.share)
                if same not in known:
                    known[same] = tuple(self._options(unit, part, places))
                yield Item(part.name, part.kind, part.layer, known[same], part.routed)
            if unit.kind is UnitKind.ATTENTION and unit.layer is not None:
                kv_bytes = self._shape.kv_bytes_per_layer[unit.layer]
                if kv_bytes not in known:
                    known[kv_bytes] = tuple(self._kv_options(unit.layer, places))
                yield Item(f"blk.{unit.layer}.kv", UnitKind.KV, unit.layer, known[kv_bytes])

    def _parts(self, unit: Unit) -> Iterator[_Part]:
        shape, tokens = self._shape, self._tokens
        if unit.kind is not UnitKind.EXPERTS or not shape.expert_count:
            needed = 1 if unit.kind is UnitKind.OUTPUT and self._one_sequence else tokens  # one token's logits
            yield _Part(unit.name, unit.kind, unit.layer, 1.0, 1.0, unit_cost.dense(needed))
            return
        count, used = shape.expert_count, self._experts_used
        for number, (experts, probability) in enumerate(self._expert_classes):
            name = f"{unit.name}#{number}"
            share = unit_cost.experts(tokens, probability)
            yield _Part(name, unit.kind, unit.layer, experts / count, experts / used, share, routed=True)

    def _options(self, unit: Unit, part: _Part, places: Places) -> Iterator[Option]:
        """Where a part could lie and be computed. `active * share.bytes` of the active bytes are read a step."""
        held = int(part.fraction * unit.num_bytes)
        moved = int(part.active * part.share.bytes * unit.active_bytes)
        for tier, device in _ordered(places):
            if device is Device.GPU and tier is not Tier.GPU and not (part.routed or self._loads_dense):
                continue
            terms = self._compute_terms(unit, part, device)
            flash_s = self._flash_seconds(unit, moved) if tier is Tier.FLASH else 0.0
            link_s = self._link_seconds(moved) if device is Device.GPU and tier is not Tier.GPU else 0.0
            yield Option(
                tier=tier,
                device=device,
                compute_s=sum(terms.values()),
                load_s=flash_s + link_s,
                load_bytes=moved if flash_s + link_s else 0,
                ram_bytes=held if tier is Tier.RAM else 0,
                gpu_bytes=_gpu_bytes(unit, held) if tier is Tier.GPU else 0,
                link_s=link_s if tier is Tier.FLASH else 0.0,
                bound_by=unit_cost.binding(terms),
            )

    def _kv_options(self, layer: int, places: Places) -> Iterator[Option]:
        """Where a layer's KV cache could lie: attention is computed there, by the CPU of what lies on flash too."""
        held = self._shape.kv_bytes_per_layer[layer] * self._context
        for tier, device in _ordered(places):
            if device is Device.CPU or tier is Tier.GPU:
                terms = self._attention_terms(layer, device)
                in_ram = self._kv_in_ram(layer) if tier is Tier.FLASH else held
                moved = self._kv_read_bytes(layer) if tier is Tier.FLASH else 0
                if tier is Tier.FLASH and in_ram >= held:
                    continue
                yield Option(
                    tier,
                    device,
                    sum(terms.values()),
                    *(self._drive_seconds(moved, READ_BYTES), moved),
                    ram_bytes=0 if tier is Tier.GPU else in_ram,
                    gpu_bytes=held if tier is Tier.GPU else 0,
                    bound_by=unit_cost.binding(terms),
                )

    def _kv_in_ram(self, layer: int) -> int:
        """Of a layer's cache on flash: the newest tokens."""
        return self._shape.kv_bytes_per_layer[layer] * min(LEAST_PIECES * PIECE_TOKENS, self._context)

    def _kv_read_bytes(self, layer: int) -> int:
        """Of a layer's cache on flash what a step reads."""
        shape, depth = self._shape, self._depth
        seen = shape.kv.read_tokens(layer, depth) if self._tokens == 1 else depth
        return max(shape.kv_bytes_per_layer[layer] * seen - self._kv_in_ram(layer), 0)

    def _compute_terms(self, unit: Unit, part: _Part, device: Device) -> Terms:
        products = unit.num_matmuls * (part.active * part.share.bytes if part.routed else 1.0)
        step = (part.share, products)
        if device is Device.GPU and self._machine.gpu is not None:
            num_bytes, weights = part.active * unit.active_bytes, part.active * unit.active_weights
            return unit_cost.gpu_terms(self._machine.gpu, num_bytes, weights, *step, part=part.fraction)
        active = unit_cost.bytes_by_type(unit, part.active)
        return unit_cost.cpu_terms(self._machine.cpu, self._settings.threads, active, *step, part=part.fraction)

    def _attention_terms(self, layer: int, device: Device) -> Terms:
        machine, step = self._machine, (layer, self._tokens, self._depth)
        if device is Device.GPU and machine.gpu is not None:
            return unit_cost.gpu_attention_terms(machine.gpu, self._shape, *step)
        return unit_cost.cpu_attention_terms(machine.cpu, self._settings.threads, self._shape, *step)

    def _flash_seconds(self, unit: Unit, num_bytes: int) -> float:
        """Reading a step's share of a unit: whole, or expert by expert."""
        pieces = max(self._shape.expert_count, 1) if unit.kind is UnitKind.EXPERTS else 1
        return self._drive_seconds(num_bytes, max(unit.num_bytes // pieces, 1))

    def _drive_seconds(self, num_bytes: int, read_bytes: int) -> float:
        return 0.0 if self._machine.flash is None else num_bytes / self._machine.flash.rate(read_bytes)

    def _link_seconds(self, num_bytes: int) -> float:
        return num_bytes / self._machine.gpu.link_to_bytes_per_s if self._machine.gpu else 0.0


def _gpu_bytes(unit: Unit, held: int) -> int:
    """What a part takes of the GPU's memory that lies there; a tied output head brings its own copy."""
    return max(held, unit.active_bytes) if unit.kind is UnitKind.OUTPUT else held


def _ordered(places: Places) -> list[tuple[Tier, Device]]:
    return sorted(places, key=lambda place: (list(Tier).index(place[0]), list(Device).index(place[1])))
