# ruff: noqa: N803  what kernels fix at compile time is upper case, and their language is a part of Python's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"
"""Triton kernel of what happens to heads before attention: norms, rotary positions, and the append to the cache.

A program serves one head of one token: a query, in place, or a key, or a value. Knows nothing about models.
"""

import triton
import triton.language as tl

from gpu_kernels.triton_rows import store_row, turned


@triton.jit
def _cache_row(positions, table, token, tokens_each, table_stride, kv_heads, head, BLOCK_TOKENS: tl.constexpr):
    """The row of a matrix (blocks * block_tokens * kv_heads, ...) that a token's head has."""
    position = tl.load(positions + token)
    block = tl.load(table + token // tokens_each * table_stride + position // BLOCK_TOKENS).to(tl.int64)
    return (block * BLOCK_TOKENS + position % BLOCK_TOKENS) * kv_heads + head


@triton.jit
def _rotated(
    x,
    weight,
    cos,
    sin,
    eps,
    PAIRS: tl.constexpr,
    LENGTH: tl.constexpr,
    D: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """The head at x, normed and rotated: (D,) float32, zeros behind LENGTH."""
    dim = tl.arange(0, D)
    there, is_pair = dim < LENGTH, dim < 2 * PAIRS
    if NEIGHBOURS:
        pair, is_second, other = dim // 2, dim % 2 == 1, dim ^ 1
    else:
        pair, is_second = dim % PAIRS, dim >= PAIRS
        other = tl.where(is_second, dim - PAIRS, dim + PAIRS)
    number = tl.load(x + dim, mask=there, other=0.0).to(tl.float32)
    partner = tl.load(x + other, mask=is_pair, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(number * number, axis=0) / LENGTH + eps)
        number *= inverse * tl.load(weight + dim, mask=there, other=0.0)
        partner *= inverse * tl.load(weight + other, mask=is_pair, other=0.0)
    c = tl.load(cos + pair, mask=is_pair, other=1.0)
    s = tl.load(sin + pair, mask=is_pair, other=0.0)
    return number * c + partner * tl.where(is_second, s, -s)


@triton.jit(do_not_specialize=["tokens_each"])
def heads_kernel(
    queries,
    keys,
    values,
    positions,
    cos,
    sin,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    table,
    query_norm,
    key_norm,
    tokens_each,
    table_stride,
    query_stride,
    key_stride,
    value_stride,
    heads,
    kv_heads,
    eps,
    LENGTH: tl.constexpr,
    VALUE: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KEY_KIND: tl.constexpr,
    KEY_STEP: tl.constexpr,
    TURNS_KEYS: tl.constexpr,
    VALUE_KIND: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    TURNS_VALUES: tl.constexpr,
):
    """Programs (tokens, heads + 2 * kv_heads): queries, then keys, then values. Queries turn as keys do."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle = tl.load(positions + token).to(tl.int64) * PAIRS
    if part < heads:
        x = queries + token * query_stride + part * LENGTH
        head = _rotated(x, query_norm, cos + angle, sin + angle, eps, PAIRS, LENGTH, D, NEIGHBOURS, HAS_NORM)
        if TURNS_KEYS:
            head = tl.reshape(turned(tl.reshape(head, (1, D)), 1, D, LENGTH), (D,))
        tl.debug_barrier()  # all of the head has been read
        tl.store(x + tl.arange(0, D), head.to(queries.dtype.element_ty), mask=tl.arange(0, D) < LENGTH)
    elif part < heads + kv_heads:
        x = keys + token * key_stride + (part - heads) * LENGTH
        row = _cache_row(positions, table, token, tokens_each, table_stride, kv_heads, part - heads, BLOCK_TOKENS)
        head = _rotated(x, key_norm, cos + angle, sin + angle, eps, PAIRS, LENGTH, D, NEIGHBOURS, HAS_NORM)
        if TURNS_KEYS:
            head = tl.reshape(turned(tl.reshape(head, (1, D)), 1, D, LENGTH), (D,))
            head = tl.where(tl.arange(0, D) < LENGTH, head, 0.0)
        store_row(key_cache, key_scales, row, head, LENGTH, KEY_KIND, KEY_STEP, D)
    else:
        kv_head = part - heads - kv_heads
        place = _cache_row(positions, table, token, tokens_each, table_stride, kv_heads, kv_head, BLOCK_TOKENS)
        dim = tl.arange(0, E)
        value = tl.load(values + token * value_stride + kv_head * VALUE + dim, mask=dim < VALUE, other=0.0)
        value = value.to(tl.float32)
        if TURNS_VALUES:
            value = tl.reshape(turned(tl.reshape(value, (1, E)), 1, E, VALUE), (E,))
            value = tl.where(dim < VALUE, value, 0.0)
        store_row(value_cache, value_scales, place, value, VALUE, VALUE_KIND, VALUE_STEP, E)
