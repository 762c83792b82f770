# ruff: noqa: N803  what kernels fix at compile time is upper case, and their language is a part of Python's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"
"""Triton kernel of what happens to heads before attention: norms, rotary positions, and the append to the cache.

A program serves one head of one token: a query, in place, or a key, or a value. Knows nothing about models.
"""

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest, of two to the even one


@triton.jit
def _cache_row(positions, table, token, tokens_each, table_stride, kv_heads, head, BLOCK_TOKENS: tl.constexpr):
    """The row of a matrix (blocks * block_tokens * kv_heads, length) that a token's head has."""
    position = tl.load(positions + token)
    block = tl.load(table + token // tokens_each * table_stride + position // BLOCK_TOKENS).to(tl.int64)
    return (block * BLOCK_TOKENS + position % BLOCK_TOKENS) * kv_heads + head


@triton.jit
def _put(cache, place, numbers, there, factor, IS_INT8: tl.constexpr):
    """Stores numbers as float16, or as codes of `factor`."""
    if IS_INT8:
        codes = numbers / tl.where(factor > 0, factor, 1.0)
        tl.store(cache + place, ((codes + _ROUND) - _ROUND).to(tl.int8), mask=there)
    else:
        tl.store(cache + place, numbers.to(tl.float16), mask=there)


@triton.jit
def _turned(
    x,
    weight,
    cos,
    sin,
    eps,
    PAIRS: tl.constexpr,
    LENGTH: tl.constexpr,
    P: tl.constexpr,
    REST: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """The head at x, normed and rotated: pairs' first numbers, their second, what does not turn; then the places."""
    pair = tl.arange(0, P)
    is_pair = pair < PAIRS
    first = 2 * pair if NEIGHBOURS else pair
    second = first + 1 if NEIGHBOURS else pair + PAIRS
    rest = 2 * PAIRS + tl.arange(0, REST)
    is_rest = rest < LENGTH
    low = tl.load(x + first, mask=is_pair, other=0.0).to(tl.float32)
    high = tl.load(x + second, mask=is_pair, other=0.0).to(tl.float32)
    other = tl.load(x + rest, mask=is_rest, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0) + tl.sum(other * other, axis=0)
        inverse = 1.0 / tl.sqrt(squares / LENGTH + eps)
        low *= inverse * tl.load(weight + first, mask=is_pair, other=0.0)
        high *= inverse * tl.load(weight + second, mask=is_pair, other=0.0)
        other *= inverse * tl.load(weight + rest, mask=is_rest, other=0.0)
    c = tl.load(cos + pair, mask=is_pair, other=0.0)
    s = tl.load(sin + pair, mask=is_pair, other=0.0)
    return low * c - high * s, low * s + high * c, other, first, second, rest, is_pair, is_rest


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
    P: tl.constexpr,
    REST: tl.constexpr,
    E: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Programs (tokens, heads + 2 * kv_heads): queries, then keys, then values."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle = tl.load(positions + token).to(tl.int64) * PAIRS
    if part < heads:
        x = queries + token * query_stride + part * LENGTH
        low, high, other, first, second, rest, is_pair, is_rest = _turned(
            x, query_norm, cos + angle, sin + angle, eps, PAIRS, LENGTH, P, REST, NEIGHBOURS, HAS_NORM
        )
        kind = queries.dtype.element_ty
        tl.store(x + first, low.to(kind), mask=is_pair)
        tl.store(x + second, high.to(kind), mask=is_pair)
        tl.store(x + rest, other.to(kind), mask=is_rest)
    elif part < heads + kv_heads:
        x = keys + token * key_stride + (part - heads) * LENGTH
        row = _cache_row(positions, table, token, tokens_each, table_stride, kv_heads, part - heads, BLOCK_TOKENS)
        low, high, other, first, second, rest, is_pair, is_rest = _turned(
            x, key_norm, cos + angle, sin + angle, eps, PAIRS, LENGTH, P, REST, NEIGHBOURS, HAS_NORM
        )
        factor = 0.0
        if IS_INT8:
            greatest = tl.maximum(tl.max(tl.abs(low), axis=0), tl.max(tl.abs(high), axis=0))
            factor = tl.maximum(greatest, tl.max(tl.abs(other), axis=0)) / 127
            tl.store(key_scales + row, factor)
        _put(key_cache, row * LENGTH + first, low, is_pair, factor, IS_INT8)
        _put(key_cache, row * LENGTH + second, high, is_pair, factor, IS_INT8)
        _put(key_cache, row * LENGTH + rest, other, is_rest, factor, IS_INT8)
    else:
        head = part - heads - kv_heads
        row = _cache_row(positions, table, token, tokens_each, table_stride, kv_heads, head, BLOCK_TOKENS)
        dim = tl.arange(0, E)
        there = dim < VALUE
        numbers = tl.load(values + token * value_stride + head * VALUE + dim, mask=there, other=0.0).to(tl.float32)
        factor = 0.0
        if IS_INT8:
            factor = tl.max(tl.abs(numbers), axis=0) / 127
            tl.store(value_scales + row, factor)
        _put(value_cache, row * VALUE + dim, numbers, there, factor, IS_INT8)
