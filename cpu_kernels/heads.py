"""Queries, keys and values on their way to attention: norms of heads, rotary positions, and the append to the KV cache.

One row does all of it, so that a step has one barrier here. Queries are changed in place; keys and values are rounded
to float16 and put where `KVLayout` says. Angles come as tables of cosines and sines, scaled as the model wants them.
Knows nothing about models. A head's result depends on nothing but that head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from cpu_kernels.isa import ISA
from cpu_kernels.kv_layout import BLOCK_TOKENS, HALF_BYTES, PIECE_BLOCKS, PIECE_TOKENS, TILE_DIMS, KVMemory
from cpu_kernels.matrix import Matrix
from cpu_kernels.native import float_bits
from cpu_kernels.program import Field, Row, times
from cpu_kernels.simd import F32, Kernel, Value, is_vector, vector_type
from cpu_kernels.traced import TracedOperation, each, float_to_half, normalise

MAX_HEAD_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines, each (positions, pairs) float32 at an address; values beyond 2 * pairs are left as they are.

    `neighbours`: pairs are (2i, 2i + 1), GGUF's NORM order; else (i, i + pairs), NEOX.
    """

    cos: Field
    sin: Field
    pairs: int
    neighbours: bool


def heads_row(
    queries: Matrix,
    keys: Matrix,
    values: Matrix,
    memory: KVMemory,
    rotation: Rotation,
    *,
    tokens: Field,
    start: Field,
    query_norm: int | None = None,
    key_norm: int | None = None,
    eps: float = 0.0,
    isa: ISA | None = None,
) -> Row:
    """Rotates queries in place, and appends rotated keys and values as tokens `start` and up; norms of heads first.

    `query_norm` and `key_norm`: addresses of `key_length` weights, both or none. The caller sees to the capacity.
    ValueError for matrices that do not fit the layout.
    """
    layout, length = memory.layout, memory.layout.key_length
    if queries.columns % length or keys.columns != layout.kv_heads * length:
        raise ValueError(f"heads: {queries.columns} query and {keys.columns} key columns for {layout}")
    if values.columns != layout.kv_heads * layout.value_length:
        raise ValueError(f"heads: {values.columns} value columns for {layout}")
    if not 0 < 2 * rotation.pairs <= length or length > MAX_HEAD_LENGTH:
        raise ValueError(f"heads: {rotation.pairs} pairs turn in heads of {length} (at most {MAX_HEAD_LENGTH})")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("heads: queries and keys are both normed, or neither")
    operation = _operation(rotation.neighbours, query_norm is not None, length, layout.value_length, rotation.pairs)
    query_heads = queries.columns // length
    args = (
        *(queries.address, queries.stride_bytes, keys.address, keys.stride_bytes),
        *(values.address, values.stride_bytes, memory.keys, memory.values, rotation.cos, rotation.sin, start),
        *(query_norm or 0, key_norm or 0, float_bits(eps), query_heads, layout.kv_heads),
    )
    return Row("heads", operation.address_for(isa), times(tokens, query_heads + 2 * layout.kv_heads), args)


@cache
def _operation(neighbours: bool, normed: bool, length: int, value_length: int, pairs: int) -> TracedOperation:
    name = f"heads_{'norm' if neighbours else 'neox'}{'_normed' if normed else ''}_{length}_{value_length}_{pairs}"
    rotate = rotate_neighbours if neighbours else rotate_halves
    return TracedOperation(
        name,
        partial(_trace, rotate=rotate, normed=normed, length=length, value_length=value_length, pairs=pairs),
    )


def _trace(
    k: Kernel,
    *,
    rotate: Callable[[Kernel, Value, Value, tuple[Value, Value], int], None],
    normed: bool,
    length: int,
    value_length: int,
    pairs: int,
) -> None:
    """Items: every head's query, then every KV head's key, then every KV head's value, token after token."""
    queries, query_stride, keys, key_stride, values, value_stride = (k.arg(index) for index in range(6))
    key_cache, value_cache, cos, sin, start, query_norm, key_norm = (k.arg(index) for index in range(6, 13))
    eps, query_heads, kv_heads = k.float_arg(13), k.arg(14), k.arg(15)
    zero, columns = k.constant(F32, 0.0), k.int64(length)
    buffer = k.scratch(4 * length)
    parts = query_heads + kv_heads * 2
    with k.loop(k.begin, k.end) as item:
        token, part = item // parts, item % parts
        position = start + token
        angles = position * (4 * pairs)
        with k.when(part < query_heads):
            query = queries + token * query_stride + part * (4 * length)
            if normed:
                normalise(k, query, query, weight=query_norm, columns=columns, eps=eps, offset=zero)
            rotate(k, query, query, (cos + angles, sin + angles), pairs)
        with k.when((part >= query_heads) & (part < query_heads + kv_heads)):
            head = part - query_heads
            key = keys + token * key_stride + head * (4 * length)
            if normed:
                normalise(k, key, key, weight=key_norm, columns=columns, eps=eps, offset=zero)
            rotate(k, buffer, key, (cos + angles, sin + angles), pairs)
            if 2 * pairs < length:
                each(
                    k,
                    k.int64(length - 2 * pairs),
                    lambda at, kind: k.store(k.load(kind, key + at + 8 * pairs), buffer + at + 8 * pairs),
                )
            block = block_of(position, head, kv_heads) * (BLOCK_TOKENS * length * HALF_BYTES)
            to = key_cache + block + (position % BLOCK_TOKENS) * HALF_BYTES
            _store_key(k, to, buffer, length)
        with k.when(part >= query_heads + kv_heads):
            head = part - query_heads - kv_heads
            tiles = -(-value_length // TILE_DIMS)
            block = block_of(position, head, kv_heads) * (BLOCK_TOKENS * tiles * TILE_DIMS * HALF_BYTES)
            to = value_cache + block + (position % BLOCK_TOKENS) * (TILE_DIMS * HALF_BYTES)
            _store_value(k, to, values + token * value_stride + head * (4 * value_length), value_length)


def block_of(position: Value, head: Value, kv_heads: Value) -> Value:
    """The block of a head that holds a position, counted in the order of memory."""
    piece = position // PIECE_TOKENS
    return (piece * kv_heads + head) * PIECE_BLOCKS + (position // BLOCK_TOKENS - piece * PIECE_BLOCKS)


def _store_key(k: Kernel, to: Value, key: Value, length: int) -> None:
    """Dimension d goes to to + 128 d."""

    def body(at: Value, kind: object) -> None:
        half = float_to_half(k, k.load(kind, key + at))
        place = to + at * (BLOCK_TOKENS * HALF_BYTES // 4)
        if is_vector(kind):
            for lane in range(k.lanes):
                k.store(half.lane(lane), place + lane * BLOCK_TOKENS * HALF_BYTES)
        else:
            k.store(half, place)

    each(k, k.int64(length), body)


def _store_value(k: Kernel, to: Value, value: Value, length: int) -> None:
    """Tile t goes to to + t * 64 tokens * 32 dimensions."""
    tile_bytes = BLOCK_TOKENS * TILE_DIMS * HALF_BYTES
    for first in range(0, length, TILE_DIMS):
        tile = to + first // TILE_DIMS * tile_bytes
        source = value + 4 * first
        each(
            k,
            k.int64(min(TILE_DIMS, length - first)),
            lambda at, kind, tile=tile, source=source: k.store(  # type: ignore[misc]
                float_to_half(k, k.load(kind, source + at)), tile + (at >> 1)
            ),
        )


def rotate_halves(k: Kernel, out: Value, x: Value, angles: tuple[Value, Value], pairs: int) -> None:
    """Turns (x[i], x[i + pairs]); addresses of float32, `angles`: of cosines and sines. `out` may be `x`."""
    cos, sin = angles

    def body(at: Value, kind: object) -> None:
        low, high = k.load(kind, x + at), k.load(kind, x + at + 4 * pairs)
        c, s = k.load(kind, cos + at), k.load(kind, sin + at)
        k.store(low * c - high * s, out + at)
        k.store(low * s + high * c, out + at + 4 * pairs)

    each(k, k.int64(pairs), body)


def rotate_neighbours(k: Kernel, out: Value, x: Value, angles: tuple[Value, Value], pairs: int) -> None:
    """Turns (x[2i], x[2i + 1]); addresses of float32, `angles`: of cosines and sines. `out` may be `x`."""
    cos, sin = angles
    half = k.lanes // 2
    whole = pairs - pairs % half
    doubled = [lane // 2 for lane in range(k.lanes)]
    swapped = [lane ^ 1 for lane in range(k.lanes)]
    signs = k.table(F32, [-1.0 if lane % 2 == 0 else 1.0 for lane in range(k.lanes)])
    part = vector_type(F32, half)
    with k.loop(0, whole, half) as pair:
        value = k.load(k.floats, x + pair * 8)
        c, s = (k.load(part, table + pair * 4).shuffle(doubled) for table in (cos, sin))
        k.store(value * c + value.shuffle(swapped) * (s * signs), out + pair * 8)
    with k.loop(whole, pairs) as pair:
        low, high = k.load(F32, x + pair * 8), k.load(F32, x + pair * 8 + 4)
        c, s = k.load(F32, cos + pair * 4), k.load(F32, sin + pair * 4)
        k.store(low * c - high * s, out + pair * 8)
        k.store(low * s + high * c, out + pair * 8 + 4)
