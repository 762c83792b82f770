"""A model on a CPU and a GPU together: the parts that one of them computes as a whole, and how long each part takes.

A part is the attention of a layer with its KV cache; what else a layer has but its routed experts; the routed experts
of a layer; the output head; and what lies outside of layers. Knows nothing about which device takes which part.
Times are seconds, sizes bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from cpu_kernels.kv_layout import PIECE_TOKENS
from gpu_kernels.layouts import LAYOUTS
from offload.tiers import Device, Tier
from planner import unit_cost
from planner.machine import Gpu, Machine
from planner.memory import packed_bytes
from planner.model_shape import ModelShape, Unit, UnitKind
from planner.placement import Option
from planner.prediction import Bottleneck
from planner.unit_cost import Share, Terms

FLOAT32_BYTES = 4
SAMPLED_S = 4e-9  # a token of the vocabulary, when one of them is chosen
SPLIT_S = 5e-6  # of the row that shares a layer's experts out
CHOOSING_S = 7.5e-4  # more, where it decides which experts are brought (128 of them, and 25 are)
# A layer whose cache lies in part in RAM, beside reading and hand-overs: what three runs on simulated GPUs took longer
# than predicted, in proportion to runs without such layers (1B shape, 4 and 13 of them, 7B shape, 3: 70, 0 and 27 us).
PART_S = 3e-5
STEP_S = 6e-4  # of the host before and after a step: its inputs, threads that begin, logits
LEARNED_S = 2e-5  # a layer, of the host after a step: which experts were used, and which are worth a place
# Operations that the hybrid executor launches: norm, products, and what lies between them. Of a router two more, for
# each of two small copies to the host.
LAUNCHES = {
    UnitKind.ATTENTION: 4,
    UnitKind.DENSE_FFN: 4,
    UnitKind.ROUTER: 7,
    UnitKind.SHARED_EXPERT: 4,
    UnitKind.EXPERTS: 6,
    UnitKind.OUTPUT: 2,
}
FEED_FORWARD = frozenset({UnitKind.DENSE_FFN, UnitKind.ROUTER, UnitKind.SHARED_EXPERT})
_ON_CPU = frozenset({UnitKind.EMBEDDING, UnitKind.OTHER})


@dataclass(frozen=True, slots=True)
class Part:
    """Units that one device computes; `kv_bytes` a token of the cache that lies with them."""

    units: tuple[Unit, ...]
    kv_bytes: int = 0

    @property
    def name(self) -> str:
        """Its first unit's."""
        return self.units[0].name

    @property
    def kind(self) -> UnitKind:
        """Its first unit's."""
        return self.units[0].kind

    @property
    def layer(self) -> int | None:
        """Its units' layer, None outside of layers."""
        return self.units[0].layer

    @property
    def gpu_bytes(self) -> int:
        """What its weights take on a GPU; a tied output head brings its own copy of the embedding."""
        return sum(gpu_bytes(unit) for unit in self.units)

    @property
    def feeds(self) -> bool:
        """Whether it is what a layer's feed-forward has beside routed experts."""
        return self.kind in FEED_FORWARD

    @property
    def may_be_on_gpu(self) -> bool:
        """Whether a GPU can compute it: kind and quant types."""
        types = {name for unit in self.units for name, _ in unit.active_bytes_by_type}
        return self.kind not in _ON_CPU and types <= LAYOUTS.keys()


def gpu_bytes(unit: Unit) -> int:
    """What a unit's weights take on a GPU, where they are held as in the file."""
    return max(unit.num_bytes, unit.active_bytes) if unit.kind is UnitKind.OUTPUT else unit.num_bytes


def launches(unit: Unit) -> int:
    """Operations that a GPU is given for a unit, attention over the cache left out.

    Matrices that are multiplied with the same activations are one where their types are the same.
    """
    weights = {name for name, _ in unit.active_bytes_by_type} - {"F32"}
    mixed = len(weights) > 1 and unit.kind is UnitKind.ATTENTION
    return LAUNCHES.get(unit.kind, 0) + (2 if mixed else 0)


def ram_bytes(unit: Unit) -> int:
    """What a unit's weights take in RAM, packed for the CPU's kernels; rounded up to the file's bytes."""
    return max(unit.num_bytes, packed_bytes(unit))


def parts(shape: ModelShape) -> tuple[Part, ...]:
    """All parts, in the order a token meets them; the experts of a layer behind its router."""
    return tuple(_parts(shape))


def part_of(shape: ModelShape, unit: str) -> str:
    """The name of the part that a unit, or a layer's KV cache, belongs to; the unit's own where there is none."""
    for part in parts(shape):
        cache = f"blk.{part.layer}.kv" if part.kind is UnitKind.ATTENTION else ""
        if unit == cache or any(unit == each.name for each in part.units):
            return part.name
    return unit


def _parts(shape: ModelShape) -> Iterator[Part]:
    for layer, group in groupby(shape.units, key=lambda unit: unit.layer):
        units = list(group)
        if layer is None:
            yield from (Part((unit,)) for unit in units)
            continue
        yield from (Part((unit,), shape.kv_bytes_per_layer[layer]) for unit in units if unit.kind is UnitKind.ATTENTION)
        if feed_forward := tuple(unit for unit in units if unit.kind in FEED_FORWARD):
            yield Part(feed_forward)
        yield from (Part((unit,)) for unit in units if unit.kind in (UnitKind.EXPERTS, UnitKind.OTHER))


def split_option(*, chooses: bool = False) -> Option:
    """The CPU shares a layer's experts out, between the GPU's router and what both compute: it costs hand-overs.

    `chooses`: it decides which experts are brought to the GPU for the step, too.
    """
    return part_option(Device.CPU, {Bottleneck.OVERHEAD: SPLIT_S + CHOOSING_S * chooses})


def step_option(layers: int) -> Option:
    """What the host takes for a step beside its parts; `layers` have experts on the GPU."""
    return part_option(Device.CPU, {Bottleneck.OVERHEAD: STEP_S + LEARNED_S * layers})


def activation_bytes(shape: ModelShape, unit: Unit) -> int:
    """What operations between the products move through the GPU's memory, for a token, of whatever experts there are.

    Norms, additions and gates pass over the width or over what a unit's products give it.
    """
    width, used = shape.embedding_length, max(shape.expert_used_count, 1)
    products = unit.active_weights // max(width, 1)  # the other dimension, of all matrices
    numbers = {
        UnitKind.ATTENTION: 4 * width + 2 * products,
        UnitKind.DENSE_FFN: 4 * width + products,
        UnitKind.ROUTER: 4 * width,
        UnitKind.SHARED_EXPERT: 3 * width + products,
        UnitKind.EXPERTS: (3 * used + 2) * width + products,
        UnitKind.OUTPUT: 4 * width,
    }
    return FLOAT32_BYTES * numbers.get(unit.kind, 0)


def part_option(device: Device, terms: Terms, *, ram_bytes: int = 0, gpu_bytes: int = 0) -> Option:
    """What a device takes for a part that lies where it computes."""
    return Option(
        tier=Tier.GPU if device is Device.GPU else Tier.RAM,
        device=device,
        compute_s=sum(terms.values()),
        load_s=0.0,
        load_bytes=0,
        ram_bytes=ram_bytes,
        gpu_bytes=gpu_bytes,
        bound_by=unit_cost.binding(terms) if terms else Bottleneck.OVERHEAD,
    )


@dataclass(frozen=True, slots=True)
class StepCosts:
    """A step of `tokens` tokens, of one sequence or of as many sequences, behind `depth` others."""

    shape: ModelShape
    machine: Machine
    threads: int
    tokens: int
    depth: int
    sequences: int = 1
    kv_tokens: int | None = None  # that the GPU holds of a cache, of all sequences; None: all
    cold_byte_s: float | None = None  # for a byte of the others, which lie on flash in part; None: in RAM

    def part(self, part: Part, device: Device) -> Terms:
        """What takes the time of a part that is not routed."""
        terms: dict[Bottleneck, float] = {}
        for unit in part.units:
            _add(terms, self._unit(unit, device))
        if part.kind is UnitKind.ATTENTION and part.layer is not None:
            for _ in range(self.sequences):
                _add(terms, self._attention(part.layer, device))
                if self.cold_byte_s is not None:
                    tokens = self.depth if device is Device.CPU else self._ram_tokens(self.tokens // self.sequences)
                    _add(terms, {Bottleneck.FLASH: self.cold_byte_s * part.kv_bytes * tokens})
        return terms

    def experts(self, unit: Unit, device: Device, share: Share, *, active: float, fraction: float) -> Terms:
        """Routed experts: `active` times the bytes a token reads, by `share`; `fraction` of what a unit costs beside.

        The same convention as `planner.items`: bytes read are active x share.bytes x active bytes.
        """
        products = unit.num_matmuls * active * share.bytes
        return self._products(unit, device, share, active, products, fraction)

    def handover_s(self) -> float:
        """Of one change of device: latency, and the tokens' hidden states over the link."""
        gpu = self.machine.gpu
        if gpu is None:
            return 0.0
        num_bytes = FLOAT32_BYTES * self.tokens * self.shape.embedding_length
        return gpu.handover_s + num_bytes / min(gpu.link_to_bytes_per_s, gpu.link_from_bytes_per_s)

    def _unit(self, unit: Unit, device: Device) -> Terms:
        if unit.kind is UnitKind.EMBEDDING:
            return {}
        tokens = self.sequences if unit.kind is UnitKind.OUTPUT else self.tokens
        terms = dict(self._products(unit, device, unit_cost.dense(tokens), 1.0, unit.num_matmuls, 1.0))
        if unit.kind is UnitKind.OUTPUT and device is Device.GPU and self.machine.gpu is not None:
            logits_bytes = FLOAT32_BYTES * tokens * self.shape.vocab_size
            _add(terms, {Bottleneck.LINK: logits_bytes / self.machine.gpu.link_from_bytes_per_s})
        if unit.kind is UnitKind.OUTPUT:
            _add(terms, {Bottleneck.OVERHEAD: self.sequences * SAMPLED_S * self.shape.vocab_size})
        return terms

    def _products(
        self, unit: Unit, device: Device, share: Share, active: float, products: float, fraction: float
    ) -> Terms:
        gpu = self.machine.gpu
        if device is Device.GPU and gpu is not None:
            sizes = active * unit.active_bytes, active * unit.active_weights
            terms = dict(unit_cost.gpu_terms(gpu, *sizes, share, 0, part=0))
            _add(terms, {Bottleneck.OVERHEAD: fraction * launches(unit) * gpu.launch_s})
            tokens = self.sequences if unit.kind is UnitKind.OUTPUT else self.tokens
            moved = fraction * tokens * activation_bytes(self.shape, unit)
            _add(terms, {Bottleneck.GPU_BANDWIDTH: moved / gpu.read_bytes_per_s})
            return terms
        by_type = unit_cost.bytes_by_type(unit, active)
        return unit_cost.cpu_terms(self.machine.cpu, self.threads, by_type, share, products, part=fraction)

    def _attention(self, layer: int, device: Device) -> Terms:
        gpu, each = self.machine.gpu, self.tokens // self.sequences
        if device is Device.GPU and gpu is not None:
            in_ram = self._ram_tokens(each)
            terms = unit_cost.gpu_attention_terms(gpu, self.shape, layer, each, self.depth - in_ram)
            return self._with_part(terms, gpu, layer, each, in_ram) if in_ram else terms
        return unit_cost.cpu_attention_terms(self.machine.cpu, self.threads, self.shape, layer, each, self.depth)

    def _ram_tokens(self, each: int) -> int:
        """Tokens of a sequence that lie in RAM, for layers of the GPU too: whole pieces of those behind the step."""
        if self.kv_tokens is None:
            return 0
        pieces = -(-max(self.depth + each - self.kv_tokens // self.sequences, 0) // PIECE_TOKENS)
        return min(pieces, self.depth // PIECE_TOKENS) * PIECE_TOKENS

    def _with_part(self, terms: Terms, gpu: Gpu, layer: int, each: int, in_ram: int) -> Terms:
        """The GPU's attention beside the CPU's over what lies in RAM: the longer, and queries and results that cross.

        Of a token queries, keys and values go; as much as queries comes back, and two numbers a head.
        """
        shape, before = self.shape, max(in_ram - (each + 1) // 2, 0)  # a token sees all of what is in RAM
        others = unit_cost.cpu_attention_terms(self.machine.cpu, self.threads, shape, layer, each, before)
        longer = terms if sum(terms.values()) >= sum(others.values()) else others
        found = dict(longer)
        sent = shape.embedding_length + shape.kv_numbers(layer)
        back = shape.embedding_length + 2 * shape.head_count
        crossing = FLOAT32_BYTES * each * (sent / gpu.link_from_bytes_per_s + back / gpu.link_to_bytes_per_s)
        _add(found, {Bottleneck.LINK: crossing + 2 * gpu.handover_s / self.sequences})
        _add(found, {Bottleneck.OVERHEAD: PART_S / self.sequences})
        return found


def _add(terms: dict[Bottleneck, float], more: Mapping[Bottleneck, float]) -> None:
    for term, seconds in more.items():
        terms[term] = terms.get(term, 0.0) + seconds
