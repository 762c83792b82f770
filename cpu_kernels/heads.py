"""Queries, keys and values on their way to attention: norms of heads, rotary positions, and the append to the KV cache.

One row does all of it, so that a step has one barrier here. Queries are changed in place; keys and values are rounded
to the cache's types and put where `KVLayout` says; a second row codes blocks of keys that are full, for types that wait
for that. Angles come as tables of cosines and sines, scaled as the model wants them. Knows nothing about models. A
head's result depends on nothing but that head, a block's on nothing but its keys.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

from cpu_kernels.isa import ISA
from cpu_kernels.kv_encode import encode_key_block, rotate_head, store_key, store_value
from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS, PIECE_TOKENS, KVLayout, KVMemory
from cpu_kernels.kv_types import KVType
from cpu_kernels.matrix import AnyMatrix
from cpu_kernels.native import float_bits
from cpu_kernels.program import Field, Row, divided, times
from cpu_kernels.simd import F32, I64, Kernel, Value, vector_type
from cpu_kernels.traced import TracedOperation, each, normalise

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
    queries: AnyMatrix,
    keys: AnyMatrix,
    values: AnyMatrix,
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
    operation = _operation(_Shape.of(layout, rotation, normed=query_norm is not None))
    query_heads = queries.columns // length
    args = (
        *(queries.address, queries.stride_bytes, keys.address, keys.stride_bytes),
        *(values.address, values.stride_bytes, memory.table, memory.window, rotation.cos, rotation.sin, start),
        *(query_norm or 0, key_norm or 0, float_bits(eps), query_heads, layout.kv_heads),
    )
    return Row("heads", operation.address_for(isa), times(tokens, query_heads + 2 * layout.kv_heads), args)


def code_keys_row(memory: KVMemory, *, tokens: Field, start: Field, isa: ISA | None = None) -> Row:
    """Codes the blocks of keys that are full with tokens `start` to start + tokens - 1, from the window.

    An item is a block of a KV head. ValueError for a layout without a window, or `tokens` that has a factor or divisor.
    """
    layout = memory.layout
    if not layout.has_window:
        raise ValueError(f"{layout} has no window of keys to code")
    blocks = divided(_more(tokens, BLOCK_TOKENS), BLOCK_TOKENS)
    operation = _coding(layout.key_type, layout.key_length)
    args = (memory.window, memory.table, tokens, start, layout.kv_heads)
    return Row("code_keys", operation.address_for(isa), times(blocks, layout.kv_heads), args)


def _more(field: Field, offset: int) -> Field:
    return field + offset if isinstance(field, int) else replace(field, offset=field.offset + offset)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the kernel is specialised for."""

    neighbours: bool
    normed: bool
    length: int
    value_length: int
    pairs: int
    key_type: KVType
    value_type: KVType
    rotates_keys: bool
    rotates_values: bool

    @classmethod
    def of(cls, layout: KVLayout, rotation: Rotation, *, normed: bool) -> "_Shape":
        return cls(
            *(rotation.neighbours, normed, layout.key_length, layout.value_length, rotation.pairs),
            *(layout.key_type, layout.value_type, layout.rotates_keys, layout.rotates_values),
        )

    @property
    def name(self) -> str:
        order, norm = "norm" if self.neighbours else "neox", "_normed" if self.normed else ""
        turned = f"{'_turned_keys' if self.rotates_keys else ''}{'_turned_values' if self.rotates_values else ''}"
        lengths = f"{self.length}_{self.value_length}_{self.pairs}"
        return f"heads_{order}{norm}_{lengths}_{self.key_type}_{self.value_type}{turned}"


@cache
def _operation(shape: _Shape) -> TracedOperation:
    return TracedOperation(shape.name, partial(_trace, shape=shape))


@cache
def _coding(kind: KVType, length: int) -> TracedOperation:
    return TracedOperation(f"code_keys_{kind}_{length}", partial(_trace_coding, kind=kind, length=length))


def _trace(k: Kernel, *, shape: _Shape) -> None:
    """Items: every head's query, then every KV head's key, then every KV head's value, token after token."""
    queries, query_stride, keys, key_stride, values, value_stride = (k.arg(index) for index in range(6))
    table, window, cos, sin, start, query_norm, key_norm = (k.arg(index) for index in range(6, 13))
    eps, query_heads, kv_heads = k.float_arg(13), k.arg(14), k.arg(15)
    length, value_length, pairs = shape.length, shape.value_length, shape.pairs
    rotate = rotate_neighbours if shape.neighbours else rotate_halves
    zero, columns = k.constant(F32, 0.0), k.int64(length)
    buffer = k.scratch(4 * max(length, value_length))
    parts = query_heads + kv_heads * 2
    with k.loop(k.begin, k.end) as item:
        token, part = item // parts, item % parts
        position = start + token
        angles = (cos + position * (4 * pairs), sin + position * (4 * pairs))
        with k.when(part < query_heads):
            query = queries + token * query_stride + part * (4 * length)
            if shape.normed:
                normalise(k, query, query, weight=query_norm, columns=columns, eps=eps, offset=zero)
            rotate(k, query, query, angles, pairs)
            if shape.rotates_keys:
                rotate_head(k, query, length)
        with k.when((part >= query_heads) & (part < query_heads + kv_heads)):
            head = part - query_heads
            key = keys + token * key_stride + head * (4 * length)
            if shape.normed:
                normalise(k, key, key, weight=key_norm, columns=columns, eps=eps, offset=zero)
            rotate(k, buffer, key, angles, pairs)
            _copy(k, buffer + 8 * pairs, key + 8 * pairs, length - 2 * pairs)
            if shape.rotates_keys:
                rotate_head(k, buffer, length)
            has_window = shape.key_type.has_minimum
            kind = KVType.F16 if has_window else shape.key_type
            if has_window:
                block = window + _block_of(position, head, kv_heads) * kind.key_block_bytes(length)
            else:
                block = _block_at(k, table, position, head, kind.key_block_bytes(length))
            store_key(k, block, position % BLOCK_TOKENS, buffer, length=length, kind=kind)
        with k.when(part >= query_heads + kv_heads):
            head = part - query_heads - kv_heads
            value = values + token * value_stride + head * (4 * value_length)
            keys_bytes = kv_heads * (PIECE_BLOCKS * shape.key_type.key_block_bytes(length))
            block_bytes = shape.value_type.value_block_bytes(value_length)
            block = _block_at(k, table, position, head, block_bytes) + keys_bytes
            if shape.rotates_values:
                _copy(k, buffer, value, value_length)
                rotate_head(k, buffer, value_length)
                value = buffer
            store_value(k, block, position % BLOCK_TOKENS, value, length=value_length, kind=shape.value_type)


def _trace_coding(k: Kernel, *, kind: KVType, length: int) -> None:
    """Items: KV heads, block after block from that of the first token."""
    window, table, tokens, start, kv_heads = (k.arg(index) for index in range(5))
    with k.loop(k.begin, k.end) as item:
        first = (start // BLOCK_TOKENS + item // kv_heads) * BLOCK_TOKENS
        with k.when(first + BLOCK_TOKENS <= start + tokens):
            head = item % kv_heads
            encode_key_block(
                k,
                _block_at(k, table, first, head, kind.key_block_bytes(length)),
                window + _block_of(first, head, kv_heads) * KVType.F16.key_block_bytes(length),
                length=length,
                kind=kind,
            )


def _copy(k: Kernel, to: Value, source: Value, count: int) -> None:
    if count:
        each(k, k.int64(count), lambda at, kind: k.store(k.load(kind, source + at), to + at))


def _block_at(k: Kernel, table: Value, position: Value, head: Value, block_bytes: int) -> Value:
    """Where a head's block lies that holds a position, if its chunk began with such blocks."""
    piece = position // PIECE_TOKENS
    block = head * PIECE_BLOCKS + (position // BLOCK_TOKENS - piece * PIECE_BLOCKS)
    return k.load(I64, table + piece * 8) + block * block_bytes


def _block_of(position: Value, head: Value, kv_heads: Value) -> Value:
    """The block of a head in the window that holds a position, counted in the order of memory."""
    piece = position // PIECE_TOKENS
    return (piece * kv_heads + head) * PIECE_BLOCKS + (position // BLOCK_TOKENS - piece * PIECE_BLOCKS)


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
