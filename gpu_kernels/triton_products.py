# ruff: noqa: N803, RUF005  what kernels fix at compile time is upper case, and their language is a part of Python's
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, assignment, attr-defined"
"""Triton kernels of products with quantised weights: few columns in float32, many with tensor cores, and decoding.

A product with a matrix and one with the experts of a stack are the same kernels: the latter reads which slot and which
pairs a program serves from a table on the device. Row indices beyond the matrix are moved to its last row, and not
stored. Knows nothing about dispatch.
"""

import triton
import triton.language as tl

from gpu_kernels.triton_decode import code_values, columns_of, existing, group_scales, load_codes, load_high


@triton.jit
def _segment(segments, tokens, codes, high, scales, scale, shift, strides, IS_EXPERT: tl.constexpr):
    """(first pair, pairs, expert, five plane pointers) of this program; `strides`: numbers of a slot of each plane."""
    first = tokens * 0
    count = tokens
    expert = tokens * 0
    if IS_EXPERT:
        entry = segments + tl.program_id(1) * 4
        slot = tl.load(entry).to(tl.int64)
        first = tl.load(entry + 1)
        count = tl.load(entry + 2)
        expert = tl.load(entry + 3)
        codes += slot * strides[0]
        high += slot * strides[1]
        scales += slot * strides[2]
        scale += slot * strides[3]
        shift += slot * strides[4]
    return first, count, expert, codes, high, scales, scale, shift


@triton.jit(do_not_specialize=["tokens", "groups", "step"])
def few_columns_kernel(
    x,
    out,
    segments,
    factors,
    bias,
    codes,
    high,
    scales,
    scale,
    shift,
    strides,
    tokens,
    rows,
    columns,
    groups,
    step,
    x_stride,
    out_stride,
    factor,
    QUANT: tl.constexpr,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    IS_EXPERT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Programs (row tiles, segments): R rows times N columns at a time, summed in float32 within a group, then scaled.

    Every stored number is read once for N columns, 16 neighbouring bytes a thread, whose sum stays in the thread.
    It is compiled without fused multiply-adds: which of them a compiler makes could depend on N, and sums must not.
    `step` is 1, which the compiler must not know: see `group_scales`.
    """
    first, count, expert, codes, high, scales, scale, shift = _segment(
        segments, tokens, codes, high, scales, scale, shift, strides, IS_EXPERT
    )
    if HAS_FACTORS:
        factor *= tl.load(factors + expert)
    wanted = tl.program_id(0) * R + tl.arange(0, R)
    row = tl.minimum(wanted, rows - 1).to(tl.int64)
    unit = tl.arange(0, UNITS)
    for start in range(0, count, N):
        totals = ()
        for _ in tl.static_range(N):
            totals = totals + (tl.zeros((R, G), tl.float32),)
        for begin in range(0, groups, G):
            group = begin + tl.arange(0, G)
            there = existing(group, unit, groups, columns, QUANT, UNITS)
            stored = load_codes(codes, row, group, unit, groups, columns, there, QUANT, UNITS)
            upper = load_high(codes, high, row, group, unit, groups, there, QUANT)
            for part in tl.static_range(PARTS):
                column = columns_of(group, unit, part, QUANT, UNITS, PARTS)
                values = code_values(stored, upper, group, unit, part, QUANT)  # (R, G, J)
                own = begin + tl.arange(0, G) * step
                d, offset = group_scales(high, scales, scale, shift, row, own, part, groups, QUANT)
                sums = ()
                for n in tl.static_range(N):
                    pair = (first + tl.minimum(start + n, count - 1)).to(tl.int64)
                    inputs = tl.load(x + pair * x_stride + column, mask=there, other=0.0).to(tl.float32)  # (G, J)
                    more = tl.sum(inputs[None, :, :] * values, axis=2) * d
                    if HAS_SHIFT:
                        more += tl.sum(inputs, axis=1)[None, :] * offset
                    sums = sums + (totals[n] + more,)
                totals = sums
        for n in tl.static_range(N):
            result = tl.sum(totals[n], axis=1) * factor
            kept = (wanted < rows) & (tl.zeros_like(wanted) + (start + n) < count)
            if HAS_BIAS:
                result += tl.load(bias + row)
            target = out + (first + start + n).to(tl.int64) * out_stride + wanted
            if ADDS:
                result += tl.load(target, mask=kept, other=0.0).to(tl.float32)
            tl.store(target, result.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens"])
def many_columns_kernel(
    x,
    x_factors,
    out,
    segments,
    factors,
    bias,
    codes,
    high,
    scales,
    scale,
    shift,
    strides,
    tokens,
    rows,
    columns,
    groups,
    x_stride,
    out_stride,
    split_stride,
    split_groups,
    factor,
    QUANT: tl.constexpr,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    IS_EXPERT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Programs (row tiles, segments or column tiles, splits): tiles of N columns x R rows by `tl.dot`.

    Weights are decoded to the type of x in registers, float16 or float32 (then products are exact to about 2^-21).
    Rows of x were scaled so that float16 holds them; `x_factors` undoes it. With IS_SPLIT a program sums over
    `split_groups` groups, and writes its part for `sum_splits_kernel`.
    """
    first, count, expert, codes, high, scales, scale, shift = _segment(
        segments, tokens, codes, high, scales, scale, shift, strides, IS_EXPERT
    )
    if HAS_FACTORS:
        factor *= tl.load(factors + expert)
    wanted = tl.program_id(0) * R + tl.arange(0, R)
    row = tl.minimum(wanted, rows - 1).to(tl.int64)
    unit = tl.arange(0, UNITS)
    token = tl.arange(0, N)
    start = 0 if IS_EXPERT else tl.program_id(1) * N
    stop = count if IS_EXPERT else tl.minimum(start + N, count)
    begin = tl.program_id(2) * split_groups
    end = tl.minimum(begin + split_groups, groups)
    for tile in range(start, stop, N):
        is_token = token < count - tile
        pair = (first + tile + token).to(tl.int64)
        total = tl.zeros((N, R), tl.float32)
        for at in range(begin, end, G):
            group = at + tl.arange(0, G)
            there = existing(group, unit, end, columns, QUANT, UNITS)
            stored = load_codes(codes, row, group, unit, groups, columns, there, QUANT, UNITS)
            upper = load_high(codes, high, row, group, unit, groups, there, QUANT)
            for part in tl.static_range(PARTS):
                column = tl.reshape(columns_of(group, unit, part, QUANT, UNITS, PARTS), (G * UNITS,))
                seen = is_token[:, None] & tl.reshape(there, (G * UNITS,))[None, :]
                inputs = tl.load(x + (pair * x_stride)[:, None] + column[None, :], mask=seen, other=0.0)
                values = code_values(stored, upper, group, unit, part, QUANT)
                d, offset = group_scales(high, scales, scale, shift, row, group, part, groups, QUANT)
                values = values * d[:, :, None]
                if HAS_SHIFT:
                    values += offset[:, :, None]
                weights = tl.trans(tl.reshape(values.to(x.dtype.element_ty), (R, G * UNITS)))
                if x.dtype.element_ty == tl.float32:
                    total = tl.dot(inputs, weights, total, input_precision="ieee")
                else:
                    total = tl.dot(inputs, weights, total)
        if x.dtype.element_ty != tl.float32:
            total *= tl.load(x_factors + pair, mask=is_token, other=0.0)[:, None]
        kept = is_token[:, None] & (wanted < rows)[None, :]
        if IS_SPLIT:
            target = out + tl.program_id(2).to(tl.int64) * split_stride + (pair * out_stride)[:, None] + wanted[None, :]
        else:
            target = out + (pair * out_stride)[:, None] + wanted[None, :]
            total *= factor
            if HAS_BIAS:
                total += tl.load(bias + row)[None, :]
            if ADDS:
                total += tl.load(target, mask=kept, other=0.0).to(tl.float32)
        tl.store(target, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def sum_splits_kernel(
    parts,
    out,
    bias,
    splits,
    rows,
    out_stride,
    split_stride,
    factor,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (tokens, rows) = the sum of parts (splits, tokens, rows), in order. Programs (tokens, blocks of rows)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + (token * 0 + split) * split_stride + token * rows + row, mask=there, other=0.0)
    total *= factor
    if HAS_BIAS:
        total += tl.load(bias + row, mask=there, other=0.0)
    target = out + token * out_stride + row
    if ADDS:
        total += tl.load(target, mask=there, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def halve_kernel(x, halves, factors, columns, x_stride, BLOCK: tl.constexpr):
    """halves (tokens, columns) float16 = x * 2^k, a row's greatest magnitude then being in [1, 2); factors 2^-k.

    Neither the numbers nor their products with weights then leave the range of float16. Rows that are zero or not
    finite are not scaled. Programs: tokens.
    """
    token = tl.program_id(0).to(tl.int64)
    greatest = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x + token * x_stride + column, mask=column < columns, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, tl.max(tl.abs(values), axis=0))
    exponent = greatest.to(tl.int32, bitcast=True) >> 23  # biased by 127
    exponent = tl.where((exponent > 0) & (exponent < 254), exponent, 127)
    up = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < columns
        values = tl.load(x + token * x_stride + column, mask=there, other=0.0).to(tl.float32)
        tl.store(halves + token * columns + column, (values * up).to(tl.float16), mask=there)
    tl.store(factors + token, (exponent << 23).to(tl.float32, bitcast=True))


@triton.jit
def decode_kernel(
    out,
    codes,
    high,
    scales,
    scale,
    shift,
    rows,
    columns,
    groups,
    QUANT: tl.constexpr,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """out (rows, columns) = the weights. Programs: (row tiles, group tiles)."""
    wanted = tl.program_id(0) * R + tl.arange(0, R)
    row = tl.minimum(wanted, rows - 1).to(tl.int64)
    group = tl.program_id(1) * G + tl.arange(0, G)
    unit = tl.arange(0, UNITS)
    there = existing(group, unit, groups, columns, QUANT, UNITS)
    stored = load_codes(codes, row, group, unit, groups, columns, there, QUANT, UNITS)
    upper = load_high(codes, high, row, group, unit, groups, there, QUANT)
    for part in tl.static_range(PARTS):
        column = columns_of(group, unit, part, QUANT, UNITS, PARTS)
        values = code_values(stored, upper, group, unit, part, QUANT)
        d, offset = group_scales(high, scales, scale, shift, row, group, part, groups, QUANT)
        values = values * d[:, :, None]
        if HAS_SHIFT:
            values += offset[:, :, None]
        place = (wanted.to(tl.int64) * columns)[:, None, None] + column[None, :, :]
        kept = (wanted < rows)[:, None, None] & there[None, :, :]
        tl.store(out + place, values.to(out.dtype.element_ty), mask=kept)
