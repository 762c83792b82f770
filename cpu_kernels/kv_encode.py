"""Numbers of a head on their way into the KV cache, as parts of kernels: turned, rounded to a type, put in place.

`kv_layout` says where, `kv_types` what the types are. Knows nothing about models. A group whose numbers are not all
finite gets a scale that is not finite either, so that damage shows and is never rounded away.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

from cpu_kernels.kv_types import BLOCK_TOKENS, HALF_BYTES, PAIR, TILE_DIMS, KVType
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
    group, step = kind.key_group, kind.step_dims
    codes = k.scratch(4 * group)
    scales = block + (token * HALF_BYTES + kind.key_codes_bytes(length))
    for number, first in enumerate(range(0, length, group)):
        count = min(group, length - first)
        coded = encoded(k, _group(k, key + 4 * first, count, group), kind)
        for index, vector in enumerate(coded.vectors):
            k.store(vector, codes + 4 * k.lanes * index)
        k.store(coded.scale, scales + number * BLOCK_TOKENS * HALF_BYTES)
        for at in range(count, -(-count // step) * step):
            k.store(k.constant(I32, 0), codes + 4 * at)
        to = block + (token * PAIR + first // step * (PAIR * BLOCK_TOKENS))
        with k.loop(0, -(-count // step)) as row:
            source = codes + row * (4 * step)
            word = _word([k.load(I32, source + 4 * dim) for dim in range(step)], kind)
            k.store(word.truncate(I16), to + row * (PAIR * BLOCK_TOKENS))


def store_value(k: Kernel, block: Value, token: Value, value: Value, *, length: int, kind: KVType) -> None:
    """A value of `length` float32 goes to place `token` of a block.

    Byte by byte where it is coded: tokens side by side may come from different threads.
    """
    tile_bytes = BLOCK_TOKENS * kind.value_tile_bytes
    if not kind.is_coded:
        for tile, first in enumerate(range(0, length, TILE_DIMS)):
            to = block + token * kind.value_tile_bytes + tile * tile_bytes
            _copy(k, to, value + 4 * first, min(TILE_DIMS, length - first), kind)
        return
    scales = block + (token * HALF_BYTES + kind.value_codes_bytes(length))
    step = block + token // PAIR * (PAIR * kind.value_tile_bytes) + token % PAIR
    codes = k.scratch(4 * kind.value_group)
    for number, first in enumerate(range(0, length, kind.value_group)):
        count = min(kind.value_group, length - first)
        size = -(-count // TILE_DIMS) * TILE_DIMS
        group = encoded(k, _group(k, value + 4 * first, count, size), kind)
        place = scales + number * BLOCK_TOKENS * HALF_BYTES
        k.store(group.scale, place)
        if kind.has_minimum:
            k.store(group.least, place + kind.value_scales_bytes(length))
        for index, vector in enumerate(group.vectors):
            k.store(vector, codes + 4 * k.lanes * index)
        for tile in range(size // TILE_DIMS):
            _store_tile(k, step + (first // TILE_DIMS + tile) * tile_bytes, codes + 4 * TILE_DIMS * tile, kind)


def encode_key_block(k: Kernel, block: Value, window: Value, *, length: int, kind: KVType) -> None:
    """A full block of float16 keys as codes with a scale and a minimum for the tokens of every channel."""
    scales = block + kind.key_codes_bytes(length)
    minima = scales + kind.key_scales_bytes(length)
    step = kind.step_dims
    whole = length // step

    def row_of(row: Value, channels: int) -> None:
        groups = []
        for part in range(channels):
            channel = row * step + part
            source = window + channel * (BLOCK_TOKENS * HALF_BYTES)
            halves = vector_type(I16, k.lanes)
            places = range(0, BLOCK_TOKENS, k.lanes)
            numbers = [k.half_to_float(k.load(halves, source + HALF_BYTES * at)) for at in places]
            group = encoded(k, numbers, kind)
            groups.append(group.vectors)
            k.store(group.scale, scales + channel * HALF_BYTES)
            k.store(group.least, minima + channel * HALF_BYTES)
        for index, vectors in enumerate(zip(*groups, strict=True)):
            word = _word(list(vectors), kind)
            k.store(word.truncate(I16), block + row * (PAIR * BLOCK_TOKENS) + PAIR * k.lanes * index)

    with k.loop(0, whole) as row:
        row_of(row, step)
    if length % step:
        row_of(k.int64(whole), length % step)


def _word(codes: list[Value], kind: KVType) -> Value:
    """Up to a step's codes in the low 16 bits of int32: of even places in the first byte, of odd in the second."""
    places = [kind.bits * (index // PAIR) + 8 * (index % PAIR) for index in range(len(codes))]
    return reduce(
        lambda a, b: a | b, [code << place if place else code for code, place in zip(codes, places, strict=True)]
    )


def encoded(k: Kernel, numbers: list[Value], kind: KVType) -> Codes:
    """A group of float32, vector after vector, as integers: rounded with the scale as it is stored."""
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
    with k.loop(0, 4 * length, 4 * width) as at:
        vector, step = k.load(kind, head + at), 1
        while step < width:
            signs = k.table(F32, [-1.0 if lane & step else 1.0 for lane in range(width)])
            vector = vector.shuffle([lane ^ step for lane in range(width)]) + vector * signs
            step *= 2
        k.store(vector, head + at)
    step = width
    while step < length:
        with k.loop(0, 4 * length, 8 * step) as first, k.loop(0, 4 * step, 4 * width) as at:
            place = head + (first + at)
            low, high = k.load(kind, place), k.load(kind, place + 4 * step)
            k.store(low + high, place)
            k.store(low - high, place + 4 * step)
        step *= 2
    with k.loop(0, 4 * length, 4 * width) as at:
        k.store(k.load(kind, head + at) * length**-0.5, head + at)


def _group(k: Kernel, source: Value, count: int, size: int) -> list[Value]:
    """`count` float32 at an address as vectors of `size`, filled up with the first."""
    if count < size:
        full = k.scratch(4 * size)
        first = k.load_splat(F32, source)
        for at in range(0, size, k.lanes):
            k.store(first, full + 4 * at)
        each(k, k.int64(count), lambda at, kind: k.store(k.load(kind, source + at), full + at))
        source = full
    return [k.load(k.floats, source + 4 * at) for at in range(0, size, k.lanes)]


def _across(k: Kernel, vectors: list[Value], join: Any) -> Value:
    """The least or the greatest of all elements."""
    value = reduce(join, vectors)
    while value.type.count > 1:
        half = value.type.count // 2
        value = join(value.shuffle(range(half)), value.shuffle(range(half, 2 * half)))
    return value.lane(0)


def _store_tile(k: Kernel, to: Value, codes: Value, kind: KVType) -> None:
    """32 integers of a value, int32 at an address: a byte has those that lie as many apart as a tile has bytes."""
    size = kind.value_tile_bytes
    with k.loop(0, size) as place:
        parts = [
            k.load(I32, codes + place * 4 + 4 * size * part) << kind.bits * part for part in range(kind.codes_a_byte)
        ]
        k.store(reduce(lambda a, b: a | b, parts).truncate(I8), to + place * PAIR)


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
