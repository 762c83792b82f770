"""Numbers of a head on their way into the KV cache, as parts of kernels: turned, rounded to a type, put in place.

`kv_layout` says where, `kv_types` what the types are. Knows nothing about models. A group whose numbers are not all
finite gets a scale that is not finite either, so that damage shows and is never rounded away.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

from cpu_kernels.kv_types import BLOCK_TOKENS, GROUP, HALF_BYTES, TILE_DIMS, KVType
from cpu_kernels.simd import F32, I8, I16, I32, Kernel, Value, is_vector, vector_type
from cpu_kernels.traced import each, float_to_half


@dataclass(frozen=True, slots=True)
class Codes:
    """A group as integers, vector after vector of int32, and the bits of its scale and minimum in float16."""

    vectors: list[Value]
    scale: Value
    least: Value


def store_key(k: Kernel, block: Value, token: Value, key: Value, *, length: int, kind: KVType) -> None:
    """A key of `length` float32 goes to place `token` of a block."""
    if not kind.is_coded:
        _scatter(k, block + token * HALF_BYTES, key, length, kind)
        return
    codes = k.scratch(4 * GROUP)
    scales = block + (token * HALF_BYTES + kind.key_codes_bytes(length))
    for number, first in enumerate(range(0, length, GROUP)):
        count = min(GROUP, length - first)
        group = encoded(k, _group(k, key + 4 * first, count), kind)
        for index, vector in enumerate(group.vectors):
            k.store(vector, codes + 4 * k.lanes * index)
        k.store(group.scale, scales + number * BLOCK_TOKENS * HALF_BYTES)
        if count % kind.codes_a_byte:
            k.store(k.constant(I32, 0), codes + 4 * count)
        to = block + (token + first // kind.codes_a_byte * BLOCK_TOKENS)
        with k.loop(0, -(-count // kind.codes_a_byte)) as row:
            parts = [
                k.load(I32, codes + row * (4 * kind.codes_a_byte) + 4 * part) << kind.bits * part
                for part in range(kind.codes_a_byte)
            ]
            k.store(reduce(lambda a, b: a | b, parts).truncate(I8), to + row * BLOCK_TOKENS)


def store_value(k: Kernel, block: Value, token: Value, value: Value, *, length: int, kind: KVType) -> None:
    """A value of `length` float32 goes to place `token` of a block."""
    tile_bytes = BLOCK_TOKENS * kind.value_tile_bytes
    scales = block + (token * HALF_BYTES + kind.value_codes_bytes(length))
    for tile, first in enumerate(range(0, length, TILE_DIMS)):
        count = min(TILE_DIMS, length - first)
        to, source = block + token * kind.value_tile_bytes + tile * tile_bytes, value + 4 * first
        if not kind.is_coded:
            _copy(k, to, source, count, kind)
            continue
        group = encoded(k, _group(k, source, count), kind)
        place = scales + tile * BLOCK_TOKENS * HALF_BYTES
        k.store(group.scale, place)
        if kind.has_minimum:
            k.store(group.least, place + kind.value_scales_bytes(length))
        _store_tile(k, to, group.vectors, kind)


def encode_key_block(k: Kernel, block: Value, window: Value, *, length: int, kind: KVType) -> None:
    """A full block of float16 keys as codes with a scale and a minimum for 32 tokens of every channel."""
    scales = block + kind.key_codes_bytes(length)
    minima = scales + kind.key_scales_bytes(length)
    whole = length // kind.codes_a_byte
    for half in range(BLOCK_TOKENS // GROUP):

        def row_of(row: Value, channels: int, half: int = half) -> None:
            groups = []
            for part in range(channels):
                channel = row * kind.codes_a_byte + part
                source = window + channel * (BLOCK_TOKENS * HALF_BYTES) + half * GROUP * HALF_BYTES
                halves = vector_type(I16, k.lanes)
                numbers = [k.half_to_float(k.load(halves, source + HALF_BYTES * at)) for at in range(0, GROUP, k.lanes)]
                group = encoded(k, numbers, kind)
                groups.append(group.vectors)
                place = channel * HALF_BYTES + half * length * HALF_BYTES
                k.store(group.scale, scales + place)
                k.store(group.least, minima + place)
            for index, vectors in enumerate(zip(*groups, strict=True)):
                byte = reduce(lambda a, b: a | b, [code << kind.bits * part for part, code in enumerate(vectors)])
                k.store(byte.truncate(I8), block + row * BLOCK_TOKENS + (half * GROUP + index * k.lanes))

        with k.loop(0, whole) as row:
            row_of(row, kind.codes_a_byte)
        if length % kind.codes_a_byte:
            row_of(k.int64(whole), length % kind.codes_a_byte)


def encoded(k: Kernel, numbers: list[Value], kind: KVType) -> Codes:
    """32 float32, vector after vector, as integers: rounded with the scale as it is stored."""
    low = _across(k, numbers, k.minimum)
    high = _across(k, numbers, k.maximum)
    zero = k.constant(F32, 0.0)
    # a sum of zeros, but where a number is not finite; minimum and maximum may pass over a NaN
    poison = k.sum_lanes(reduce(lambda a, b: a + b, [number * 0.0 for number in numbers]))
    least, least_bits = zero, k.constant(I16, 0)
    if kind.has_minimum:
        least_bits = float_to_half(k, low)
        least = k.half_to_float(least_bits)
        scale = (high - least) * (1.0 / kind.highest)
    elif kind is KVType.Q4_0:
        scale = k.select(-low >= high, low, high) * -0.125
    else:
        scale = k.maximum(high, -low) * (1.0 / kind.highest)
    scale_bits = float_to_half(k, scale + poison)
    rounded = k.half_to_float(scale_bits)
    factor = k.select(rounded.equals(0.0), zero, 1.0 / rounded)
    lowest = 0 if kind.has_minimum else -8 if kind is KVType.Q4_0 else -kind.highest
    vectors = []
    for number in numbers:
        scaled = (number - k.splat(least)) * k.splat(factor) if kind.has_minimum else number * k.splat(factor)
        code = k.minimum(
            k.maximum(k.round_to_int(scaled), k.constant(k.ints, lowest)), k.constant(k.ints, kind.highest)
        )
        code = code + 8 if kind is KVType.Q4_0 else code
        vectors.append(code & ((1 << kind.bits) - 1))
    return Codes(vectors, scale_bits, least_bits)


def rotate_head(k: Kernel, head: Value, length: int) -> None:
    """`length` float32 in place times the orthogonal Walsh-Hadamard matrix; `length` a power of two."""
    width = min(length, k.lanes)
    kind = vector_type(F32, width)
    vectors = [k.load(kind, head + 4 * at) for at in range(0, length, width)]
    step = 1
    while step < width:
        signs = k.table(F32, [-1.0 if lane & step else 1.0 for lane in range(width)])
        order = [lane ^ step for lane in range(width)]
        vectors = [vector.shuffle(order) + vector * signs for vector in vectors]
        step *= 2
    step = 1
    while step < len(vectors):
        pairs = [(vectors[at & ~step], vectors[at | step], at & step) for at in range(len(vectors))]
        vectors = [low - high if second else low + high for low, high, second in pairs]
        step *= 2
    for at, vector in enumerate(vectors):
        k.store(vector * length**-0.5, head + 4 * width * at)


def _group(k: Kernel, source: Value, count: int) -> list[Value]:
    """`count` float32 at an address as vectors of 32, filled up with the first."""
    if count < GROUP:
        full = k.scratch(4 * GROUP)
        first = k.load_splat(F32, source)
        for at in range(0, GROUP, k.lanes):
            k.store(first, full + 4 * at)
        each(k, k.int64(count), lambda at, kind: k.store(k.load(kind, source + at), full + at))
        source = full
    return [k.load(k.floats, source + 4 * at) for at in range(0, GROUP, k.lanes)]


def _across(k: Kernel, vectors: list[Value], join: Any) -> Value:
    """The least or the greatest of all elements."""
    value = reduce(join, vectors)
    while value.type.count > 1:
        half = value.type.count // 2
        value = join(value.shuffle(range(half)), value.shuffle(range(half, 2 * half)))
    return value.lane(0)


def _store_tile(k: Kernel, to: Value, codes: list[Value], kind: KVType) -> None:
    """32 integers of a value."""
    if kind.bits == 8:
        for index, vector in enumerate(codes):
            k.store(vector.truncate(I8), to + k.lanes * index)
        return
    if kind.bits == 4:
        half = len(codes) // 2
        for index in range(half):
            k.store((codes[index] | (codes[index + half] << 4)).truncate(I8), to + k.lanes * index)
        return
    vectors_a_word = max(1, 16 // k.lanes)
    for word in range(2):
        parts = [
            k.sum_lanes(vector << k.table(I32, [2 * (k.lanes * index + lane) for lane in range(k.lanes)]))
            for index, vector in enumerate(codes[word * vectors_a_word : (word + 1) * vectors_a_word])
        ]
        k.store(reduce(lambda a, b: a | b, parts), to + 4 * word)


def _copy(k: Kernel, to: Value, source: Value, count: int, kind: KVType) -> None:
    each(k, k.int64(count), lambda at, typed: k.store(_narrow(k, k.load(typed, source + at), kind), to + (at >> 1)))


def _scatter(k: Kernel, to: Value, key: Value, length: int, kind: KVType) -> None:
    """Dimension d goes to to + 128 d."""

    def body(at: Value, typed: Any) -> None:
        number = _narrow(k, k.load(typed, key + at), kind)
        place = to + at * (BLOCK_TOKENS * HALF_BYTES // 4)
        if is_vector(typed):
            for lane in range(k.lanes):
                k.store(number.lane(lane), place + lane * BLOCK_TOKENS * HALF_BYTES)
        else:
            k.store(number, place)

    each(k, k.int64(length), body)


def _narrow(k: Kernel, x: Value, kind: KVType) -> Value:
    """float32 as the bits of float16 or bfloat16, to nearest, ties to even."""
    if kind is KVType.F16:
        return float_to_half(k, x)
    bits = x.bitcast(vector_type(I32, x.type.count) if is_vector(x.type) else I32)
    nearest = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return k.select(is_nan, (bits >> 16) | 0x40, nearest).truncate(I16)
