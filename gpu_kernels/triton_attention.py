# ruff: noqa: N803, PLR0915  what kernels fix at compile time is upper case, and their language is a part of Python's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"
"""Triton kernels of attention over blocks of keys and values: flash-decoding for few tokens, tiles for prompts.

Online softmax (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). A program serves a tile of
rows of one KV head, a row being one query head of one token, and a run of the lane's context; where that is shared by
several programs (`splits`), `triton_parts` joins their parts. Runs begin at fixed places, and what a row may not
see leaves its sums as they are to the bit, so that they do not depend on the other rows. Lengths and block tables are
read on the device. Memory behind a lane's length may hold anything. Knows nothing about models.
"""

import triton
import triton.language as tl

from gpu_kernels.triton_rows import dims_of, load_rows, turned


@triton.jit(do_not_specialize=["tokens_each"])
def attention_kernel(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    lengths,
    out,
    parts,
    sums,
    marks,
    tokens_each,
    table_stride,
    query_stride,
    out_stride,
    marks_stride,
    kv_heads,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    KEY_KIND: tl.constexpr,
    KEY_STEP: tl.constexpr,
    VALUE_KIND: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    TURNS_VALUES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MARKS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """Programs (row tiles, lanes * kv_heads, splits). M rows meet N tokens at a time.

    Products are of float16 numbers with float32 sums; with IS_EXACT of float32. Split: writes the weighted values to
    parts (splits, tokens, heads, VALUE), where a program has any of the context, and the logarithms of the sums of
    weights, else -inf, to sums (splits, tokens, heads); else with HAS_MARKS what `Kernels.attention` tells to marks.
    """
    lane = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    length = tl.load(lengths + lane)
    index = tl.program_id(0) * M + tl.arange(0, M)  # token * GROUP + query head of the group
    token = index // GROUP
    is_row = token < tokens_each
    position = length - tokens_each + token
    head = kv_head * GROUP + index % GROUP
    row = (lane * tokens_each + token).to(tl.int64)
    dim, value_dim = dims_of(D, KEY_KIND, KEY_STEP), dims_of(E, VALUE_KIND, VALUE_STEP)
    place = (row * query_stride + head * KEY)[:, None] + dim[None, :]
    query = tl.load(queries + place, mask=is_row[:, None] & (dim < KEY)[None, :], other=0.0).to(tl.float32)
    kind: tl.constexpr = tl.float32 if IS_EXACT else tl.float16
    precision: tl.constexpr = "ieee" if IS_EXACT else "tf32"
    query = (query * scale).to(kind)

    last = tl.minimum(length, length - tokens_each + (tl.program_id(0) * M + M - 1) // GROUP + 1)
    start = tl.zeros_like(length)
    if HAS_WINDOW:
        start = tl.maximum(length - tokens_each + tl.program_id(0) * M // GROUP - window + 1, 0) // N * N
    if IS_SPLIT:
        start = tl.maximum(start, tl.program_id(2) * SPLIT)
        last = tl.minimum(last, (tl.program_id(2) + 1) * SPLIT)

    greatest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, E), tl.float32)
    for begin in range(start, last, N):
        seen = begin + tl.arange(0, N)
        there = seen < last
        block = tl.load(table + lane * table_stride + seen // BLOCK_TOKENS, mask=there, other=0)
        held = (block.to(tl.int64) * BLOCK_TOKENS + seen % BLOCK_TOKENS) * kv_heads + kv_head
        key = load_rows(keys, key_scales, held, there, KEY, KEY_KIND, KEY_STEP, N, D)
        scores = tl.dot(query, tl.trans(key.to(kind)), input_precision=precision)
        if HAS_SOFTCAP:
            scores = softcap * (2 / (1 + tl.exp(-2 * scores / softcap)) - 1)  # tanh
        behind = position[:, None] - seen[None, :]
        shown = there[None, :] & (behind >= 0)
        if HAS_WINDOW:
            shown = shown & (behind < window)
        scores = tl.where(shown, scores, -float("inf"))
        peak = tl.maximum(greatest, tl.max(scores, axis=1))
        safe = tl.where(peak == -float("inf"), 0.0, peak)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(greatest - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        value = load_rows(values, value_scales, held, there, VALUE, VALUE_KIND, VALUE_STEP, N, E)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(kind), value.to(kind), input_precision=precision)
        greatest = peak

    heads = kv_heads * GROUP
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if TURNS_VALUES:  # in the order of places, of which a dimension's bits are a permutation, as the matrix allows
        mixed = turned(mixed, M, E, VALUE)
    kept = is_row[:, None] & (value_dim < VALUE)[None, :]
    if IS_SPLIT:
        part = (tl.program_id(2) * (tl.num_programs(1) // kv_heads) * tokens_each + row) * heads + head
        tl.store(
            parts + part[:, None] * VALUE + value_dim[None, :],
            mixed,
            mask=kept & (tl.zeros_like(index) + start < last)[:, None],
        )
        logarithm = greatest + tl.log(tl.where(total > 0, total, 1.0))  # -inf where nothing was seen
        tl.store(sums + part, logarithm, mask=is_row)
    else:
        target = out + (row * out_stride + head * VALUE)[:, None] + value_dim[None, :]
        tl.store(target, mixed.to(out.dtype.element_ty), mask=kept)
        if HAS_MARKS:
            tl.store(marks + row * marks_stride + head, greatest, mask=is_row)
            tl.store(marks + row * marks_stride + heads + head, total, mask=is_row)
