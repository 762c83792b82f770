"""How long one unit takes on a device of a machine, for a step of any number of tokens.

Products from the machine's kernel points, by quant type and columns; attention from the bytes and scores of the KV
cache; fixed costs per operation. Knows nothing about placements. Times are seconds, sizes bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from planner.machine import AttentionPoint, Cpu, Gpu, KernelPoint
from planner.model_shape import ModelShape, Unit
from planner.prediction import Bottleneck

Terms = Mapping[Bottleneck, float]

UNIT_ROWS = 6  # operations of a program that a unit takes, beside its products
UNIT_LAUNCHES = 6  # kernels of the GPU
# Calibrated on whole runs with one and two threads of an AMD EPYC (family 26): the 1B shape in Q4_0 behind 512 and 4096
# tokens, OLMoE's in Q4_0 behind 512 and 2048. PRODUCT_S anew, by the times of rows: 0 to 2.7 us a product, dense ones
# and experts of OLMoE's and Qwen3's shapes in Q4_0 alike. COLUMNS_SHARE anew since attention is measured by itself:
# prompts of dense models went 8 to 11% faster than 0.8 promised, those of mixtures 5% slower to 5% faster.
PRODUCT_S = 2e-6  # until a product that comes from RAM is read at full speed
PRODUCT_BYTES = 1 << 18  # smaller matrices come from caches, and more quickly than measured
COLUMNS_SHARE = 0.84  # of the rate of products of many tokens, with what lies between them
CACHE_READ_SHARE = 0.75  # of RAM bandwidth that attention reads a KV cache with
READING_SHARE = 0.5  # of the RAM's bandwidth: a product that reads less computes longer than it waits
EXPLAINED = 0.95  # of a best rate: a product that reaches it is bound by it
SCORE_FLOPS = 100  # one attention score: its two products over a head, and the softmax
INDEX_BYTES_PER_S = 13e9  # of a thread that chooses what to read: 14.6 us a KV head of 64 behind 16384 tokens


@dataclass(frozen=True, slots=True)
class Share:
    """What a step's tokens use of a unit: the share of its bytes, and the tokens that meet each of them."""

    bytes: float
    tokens: float


def dense(tokens: int) -> Share:
    """All of the unit, by all tokens."""
    return Share(1.0, tokens)


def experts(tokens: int, probability: float) -> Share:
    """Experts that a token uses with `probability` each: those that any token uses, and the tokens of each of them."""
    touched = 1 - (1 - probability) ** tokens
    return Share(touched, tokens * probability / touched if touched else 0.0)


def cpu_seconds(
    cpu: Cpu, threads: int, num_bytes_by_type: dict[str, float], share: Share, products: float, *, part: float = 1.0
) -> float:
    """Products of matrices of these bytes, `products` in number; `part` of what a unit costs beside them."""
    return sum(cpu_terms(cpu, threads, num_bytes_by_type, share, products, part=part).values())


def cpu_terms(
    cpu: Cpu, threads: int, num_bytes_by_type: dict[str, float], share: Share, products: float, *, part: float = 1.0
) -> Terms:
    """The same by what takes the seconds: each type's products by RAM bandwidth or computing, and the overhead."""
    terms = {Bottleneck.RAM_BANDWIDTH: 0.0, Bottleneck.COMPUTE: 0.0}
    for name, num_bytes in num_bytes_by_type.items():
        points = _points(cpu, name, threads)
        seconds = num_bytes * share.bytes * _seconds_per_byte(points, share.tokens)
        if share.tokens > 1:
            seconds /= COLUMNS_SHARE
        terms[_binding(points, read_rate(cpu, threads), share.tokens)] += seconds
    large = share.bytes * sum(num_bytes_by_type.values()) > PRODUCT_BYTES * max(products, 1)
    product_s = PRODUCT_S if large else cpu.operation_s
    terms[Bottleneck.OVERHEAD] = part * UNIT_ROWS * cpu.operation_s + products * product_s
    return terms


def gpu_seconds(
    gpu: Gpu, num_bytes: float, num_weights: float, share: Share, products: float, *, part: float = 1.0
) -> float:
    """The same on the GPU: reading, or multiplying where there are many tokens."""
    return sum(gpu_terms(gpu, num_bytes, num_weights, share, products, part=part).values())


def gpu_terms(
    gpu: Gpu, num_bytes: float, num_weights: float, share: Share, products: float, *, part: float = 1.0
) -> Terms:
    """The same by what takes the seconds."""
    reading = num_bytes * share.bytes / gpu.read_bytes_per_s
    multiplying = 2 * num_weights * share.bytes * share.tokens / gpu.flops_per_s
    overhead = gpu.launch_s * (part * UNIT_LAUNCHES + products)
    return {**_longer(Bottleneck.GPU_BANDWIDTH, reading, multiplying), Bottleneck.OVERHEAD: overhead}


def cpu_attention_seconds(cpu: Cpu, threads: int, shape: ModelShape, layer: int, tokens: int, depth: int) -> float:
    """Attention of `tokens` tokens behind `depth` others over a layer's cache in RAM."""
    return sum(cpu_attention_terms(cpu, threads, shape, layer, tokens, depth).values())


def cpu_attention_terms(cpu: Cpu, threads: int, shape: ModelShape, layer: int, tokens: int, depth: int) -> Terms:
    """The same by what takes the seconds.

    One token alone reads what it chooses, where the cache has a budget for it, and the index of all that it chooses
    from.
    """
    seen = shape.kv.read_tokens(layer, depth) if tokens == 1 else depth
    index = shape.kv_index_bytes(layer)
    read = (shape.kv_bytes_per_layer[layer] - index) * (seen + tokens)
    ram_bytes_per_s = read_rate(cpu, threads)
    choosing = index * depth / min(INDEX_BYTES_PER_S * threads, ram_bytes_per_s) if seen < depth else 0.0
    points = [_attention_point(cpu, kind.value, threads) for kind in shape.kv.of_layer(layer, shape.block_count)]
    rates = [point for point in points if point is not None]
    if len(rates) == len(points):  # of keys and of values
        reading = read * sum(1 / point.read_bytes_per_s for point in rates) / len(rates)
        macs = shape.head_length(layer) * _scores(shape, tokens, seen)
        scores = 0.0 if tokens == 1 else macs * sum(1 / point.macs_per_s for point in rates) / len(rates)
        from_ram = read / ram_bytes_per_s >= READING_SHARE * reading
    else:
        flops_per_s = cpu.flops_per_s * min(threads / cpu.threads, 1.0)
        scores = SCORE_FLOPS * _scores(shape, tokens, seen) / flops_per_s
        reading, from_ram = read / (CACHE_READ_SHARE * ram_bytes_per_s), True
    bound = Bottleneck.RAM_BANDWIDTH if from_ram else Bottleneck.COMPUTE
    return {**_longer(bound, reading + choosing, scores), Bottleneck.OVERHEAD: cpu.operation_s}


def gpu_attention_seconds(gpu: Gpu, shape: ModelShape, layer: int, tokens: int, depth: int) -> float:
    """The same over a cache in the GPU's memory."""
    return sum(gpu_attention_terms(gpu, shape, layer, tokens, depth).values())


def gpu_attention_terms(gpu: Gpu, shape: ModelShape, layer: int, tokens: int, depth: int) -> Terms:
    """The same by what takes the seconds."""
    scores = SCORE_FLOPS * _scores(shape, tokens, depth) / gpu.flops_per_s
    reading = _cache_bytes(shape, layer, tokens, depth) / gpu.read_bytes_per_s
    return {**_longer(Bottleneck.GPU_BANDWIDTH, reading, scores), Bottleneck.OVERHEAD: gpu.launch_s}


def binding(terms: Terms) -> Bottleneck:
    """What takes most of the seconds."""
    return max(terms, key=lambda term: terms[term])


def _longer(bandwidth: Bottleneck, reading_s: float, computing_s: float) -> Terms:
    """Reading and computing side by side: the longer takes the time."""
    return {bandwidth: reading_s} if reading_s >= computing_s else {Bottleneck.COMPUTE: computing_s}


def _binding(points: list[KernelPoint], read_bytes_per_s: float, columns: float) -> Bottleneck:
    """What a product waits for, whose points are of one type and thread count, in a RAM of that bandwidth.

    RAM, where reading explains its time; computing, where multiplications at the best rate of any number of columns do.
    Where neither does, RAM for half of it or more: what is left is unpacking.
    """
    nearest = min(points, key=lambda point: abs(point.columns - columns))
    reading = nearest.bytes_per_s / read_bytes_per_s
    multiplying = nearest.macs_per_s / max(point.macs_per_s for point in points) if len(points) > 1 else 0.0
    from_ram = reading >= EXPLAINED or (reading >= READING_SHARE and multiplying < EXPLAINED)
    return Bottleneck.RAM_BANDWIDTH if from_ram else Bottleneck.COMPUTE


def read_rate(cpu: Cpu, threads: int) -> float:
    """RAM bandwidth at the most threads measured that are not more than `threads`."""
    return next((point.bytes_per_s for point in reversed(cpu.read) if point.at <= threads), cpu.read[0].bytes_per_s)


def _cache_bytes(shape: ModelShape, layer: int, tokens: int, depth: int) -> int:
    return shape.kv_bytes_per_layer[layer] * (depth + tokens)


def _scores(shape: ModelShape, tokens: int, depth: int) -> float:
    return shape.head_count * tokens * (depth + (tokens + 1) / 2)


def _attention_point(cpu: Cpu, name: str, threads: int) -> AttentionPoint | None:
    """Of a type at the most threads measured that are not more than `threads`; None where it was not measured."""
    points = cpu.attention.get(name, ())
    return max((point for point in points if point.threads <= threads), key=lambda point: point.threads, default=None)


def bytes_by_type(unit: Unit, scale: float) -> dict[str, float]:
    """A unit's active bytes by quant type, times `scale`."""
    return {name: scale * num_bytes for name, num_bytes in unit.active_bytes_by_type}


def _points(cpu: Cpu, name: str, threads: int) -> list[KernelPoint]:
    """Points of a type at the nearest thread count that is not above `threads`, by columns; of F32 for other types."""
    points = cpu.kernels.get(name) or cpu.kernels["F32"]
    counts = {point.threads for point in points}
    nearest = max((count for count in counts if count <= threads), default=min(counts))
    return sorted((point for point in points if point.threads == nearest), key=lambda point: point.columns)


def _seconds_per_byte(points: list[KernelPoint], columns: float) -> float:
    """Between two points in proportion, beyond the last as many times as long as there are columns."""
    for low, high in pairwise(points):
        if columns < high.columns:
            share = max(columns - low.columns, 0.0) / (high.columns - low.columns)
            return (1 - share) / low.bytes_per_s + share / high.bytes_per_s
    last = points[-1]
    return max(columns / last.columns, 1.0) / last.bytes_per_s
