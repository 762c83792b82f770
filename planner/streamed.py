"""Weights that are read from flash when a step needs them: their slots in RAM, what a step misses, what that takes.

Those are the routed experts of a mixture of experts, a slot for each, or the layers of a dense model. Knows nothing
about who reads. Times are seconds, sizes bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.flash import DEPTH, READ_BYTES
from offload.memory import HUGE_PAGE_BYTES
from offload.policies import DENSE_SHARE
from offload.tiers import Device
from planner.budget import Budget
from planner.hit_curve import HitCurve, assumed_curve
from planner.items import POPULARITY_EXPONENT
from planner.machine import Flash
from planner.memory import memory_needs, packed_activations_bytes, packed_bytes
from planner.model_shape import ModelShape, Unit, UnitKind
from planner.plan import Needs, Settings, WeightsForm
from planner.prediction import Bottleneck

PAGE_BYTES = 4096
READ_SHARE = 0.9  # of the drive's rate: between a layer's last read and the next one's first it idles
PACK_BYTES_PER_S = 3.0e9  # of a core that makes panels of what was read
LANDING_SHARE = 0.8  # of the arithmetic of a layer's experts: done while others of them land
LEAST_LAYERS = 2  # of a dense model: one that is computed, one that arrives
CYCLING_LAYERS = 2  # slots of a dense model through which layers pass; the others stay


@dataclass(frozen=True, slots=True)
class Streaming:
    """The drive that weights come from, and how often they need not come."""

    flash: Flash
    curve: HitCurve


def streamed_units(shape: ModelShape) -> list[Unit]:
    """The experts of every layer, or a dense model's layers."""
    if shape.expert_count:
        return [unit for unit in shape.units if unit.kind is UnitKind.EXPERTS]
    return [unit for unit in shape.units if unit.kind in (UnitKind.ATTENTION, UnitKind.DENSE_FFN)]


def num_layers(shape: ModelShape) -> int:
    """Layers that have streamed weights."""
    return len({unit.layer for unit in streamed_units(shape)})


def all_slots(shape: ModelShape) -> int:
    """Slots that would hold all of it."""
    return num_layers(shape) * max(shape.expert_count, 1)


def least_slots(shape: ModelShape, chunk_tokens: int) -> int:
    """Slots without which a step of so many tokens cannot be computed."""
    if not shape.expert_count:
        return min(LEAST_LAYERS, all_slots(shape))
    return min(shape.expert_count, chunk_tokens * shape.expert_used_count)


def slot_bytes(shape: ModelShape) -> int:
    """RAM that the largest expert or layer takes, in whole pages."""
    layers: dict[int | None, int] = {}
    for unit in streamed_units(shape):
        layers[unit.layer] = layers.get(unit.layer, 0) + packed_bytes(unit)
    largest = max(layers.values(), default=0) // max(shape.expert_count, 1)
    return -(-largest // PAGE_BYTES) * PAGE_BYTES


def hit_curve(shape: ModelShape, known: HitCurve | None = None) -> HitCurve:
    """How often what a token uses is found in RAM by the number of slots: as measured for this model, or as assumed."""
    if known is not None:
        return known
    layers, experts = num_layers(shape), shape.expert_count
    if not experts:  # layers come round and round: of those that do not stay none is there when its turn comes
        return HitCurve((0, CYCLING_LAYERS, layers, layers + 1), (0.0, 0.0, 1 - CYCLING_LAYERS / layers, 1.0), False)
    return assumed_curve(layers, experts, max(shape.expert_used_count, 1), popularity_exponent=POPULARITY_EXPONENT)


def missed_bytes(shape: ModelShape, curve: HitCurve, *, slots: int, tokens: int) -> float:
    """Bytes that a step of `tokens` tokens reads. Those of a long prompt use all, layer after layer.

    Then of the slots that the layer being computed leaves to others, each holds what is not read anew.
    """
    total = sum(unit.num_bytes for unit in streamed_units(shape))
    one = curve.hit_rate(slots)
    if not shape.expert_count:
        return total * (1 - one) if slots < all_slots(shape) else 0.0
    first = shape.expert_used_count / shape.expert_count
    used = _used_share(shape, tokens)
    others = all_slots(shape) - shape.expert_count
    kept = min(max(slots - shape.expert_count, 0) / others, 1.0) if others else float(slots >= all_slots(shape))
    # between one token, whose experts a good policy foresees, and all experts
    spread = (used - first) / max(1 - first, 1e-9)
    hit = one + (kept - one) * spread
    return total * used * (1 - hit)


def streamed_needs(
    shape: ModelShape,
    budget: Budget,
    *,
    context_tokens: int,
    chunk_tokens: int,
    slots: int,
    kv_ram_bytes: int | None = None,
) -> Needs:
    """Bytes of RAM with that many slots and all that is not streamed; `kv_ram_bytes`: see `Settings`."""
    needs = memory_needs(
        shape, budget, Device.CPU, WeightsForm.PACKED, context_tokens=context_tokens, chunk_tokens=chunk_tokens
    )
    streamed = sum(packed_bytes(unit) for unit in streamed_units(shape))
    spilled = 0 if kv_ram_bytes is None else shape.kv_bytes_per_token * context_tokens - kv_ram_bytes
    ram = replace(
        needs.ram,
        weights_bytes=needs.ram.weights_bytes - streamed,
        kv_bytes=needs.ram.kv_bytes - spilled,
        slots_bytes=slots * slot_bytes(shape),
        activations_bytes=packed_activations_bytes(shape, min(chunk_tokens, context_tokens)),
        buffers_bytes=needs.ram.buffers_bytes + DEPTH * HUGE_PAGE_BYTES,
    )
    return replace(needs, ram=ram)


def step_seconds(
    shape: ModelShape,
    cpu_seconds: float,
    streaming: Streaming,
    settings: Settings,
    tokens: int,
    *,
    experts_s: float = 0.0,
    read_ahead_s: float = 0.0,
) -> Mapping[Bottleneck, float]:
    """Seconds of a step of `tokens` tokens whose arithmetic takes `cpu_seconds`, by what they are spent with.

    Where a step uses all of a layer, it is read ahead as far as slots are free for that, behind the arithmetic of the
    layers before; the rest lands while experts that are there are computed, which take `experts_s` of the arithmetic.
    Else reads wait for their layer's router. `read_ahead_s`: what the drive takes beside for reads that need not wait,
    but for those of the first layer.
    """
    missed = missed_bytes(shape, streaming.curve, slots=settings.stream_slots, tokens=tokens)
    reading = missed / read_bytes_per_s(shape, streaming.flash)
    packing = missed / (PACK_BYTES_PER_S * settings.threads)
    first = read_ahead_s / num_layers(shape)
    if _used_share(shape, tokens) >= DENSE_SHARE:  # what is packed takes the time of those who compute
        ahead = _ahead_share(shape, settings.stream_slots)
        hidden = min(ahead * cpu_seconds + (1 - ahead) * LANDING_SHARE * experts_s, reading)
        beside = max(read_ahead_s - first - (cpu_seconds - hidden), 0.0)
        arriving = max(reading - hidden + beside, packing) + first
    else:
        arriving = max(reading, packing) + max(read_ahead_s - first - cpu_seconds, 0.0) + first
    return {Bottleneck.FLASH: arriving, Bottleneck.RAM_BANDWIDTH: cpu_seconds}


def read_bytes_per_s(shape: ModelShape, flash: Flash) -> float:
    """At which the drive brings what steps lack, by the size of their reads."""
    parts = num_layers(shape) * max(shape.expert_count, 1) * 3
    read_bytes = min(sum(unit.num_bytes for unit in streamed_units(shape)) // parts, READ_BYTES)
    return reads_bytes_per_s(flash, read_bytes)


def reads_bytes_per_s(flash: Flash, read_bytes: int) -> float:
    """At which a drive brings reads of that size, layer after layer."""
    return READ_SHARE * _rate(flash, read_bytes)


def _ahead_share(shape: ModelShape, slots: int) -> float:
    """Of what a layer lacks: read before its turn, with all of one layer in use and room for all of another kept."""
    if not shape.expert_count:
        return 1.0
    count, layers = shape.expert_count, num_layers(shape)
    lacking = count * (1 - max(slots - count, 0) / max(count * (layers - 1), 1))
    return min(max(slots - 2 * count, 0) / lacking, 1.0) if lacking > 0 else 1.0


def _used_share(shape: ModelShape, tokens: int) -> float:
    """Of a layer's streamed weights, by a step of `tokens` tokens."""
    return 1 - (1 - shape.expert_used_count / shape.expert_count) ** tokens if shape.expert_count else 1.0


def _rate(flash: Flash, read_bytes: int) -> float:
    """Bytes a second of reads of that size, as many at a time as the reader's, past the page cache where measured."""
    points = [point for point in flash.points if point.read_bytes <= read_bytes and point.depth <= DEPTH]
    direct = [point for point in points if point.direct] or points
    return max((point.bytes_per_s for point in direct), default=flash.rate(read_bytes))
