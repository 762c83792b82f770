# ruff: noqa: N803, PLR0915, PLR1714  what kernels fix at compile time is upper case, and their language is a part of Python's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"
"""Quant blocks to weights in registers, for Triton kernels: tiles of (rows, groups, units).

A *unit* is one stored number of the plane of codes (a byte, or a float); it holds the codes of PARTS weights. A *group*
is a run of UNITS units whose parts have one scale each. For part p the weights of a tile are
`code_values(...) * scale + shift` with (scale, shift) of `group_scales(...)`, and lie in the columns `columns_of(...)`;
they are the reference's to the bit, since the product is exact. Codes become floats without conversions, which run at
a quarter of the rate of additions: their bits are put under those of 2^23. Knows nothing about products.
"""

import triton
import triton.language as tl

_MAGIC = tl.constexpr(0x4B000000)  # the bits of 2^23
_MAGIC_VALUE = tl.constexpr(8388608.0)
_E2M1_NIBBLES = tl.constexpr(0xC8643210 - (1 << 32))  # doubled magnitudes of codes 0 to 7
# The 16 values of the IQ4 types plus 128, four bytes a word.
_IQ4_WORDS = tl.constexpr((0x3F2D1801, 0x766A5D4F, 0xA6998D81 - (1 << 32), 0xF1D9C5B5 - (1 << 32)))


@triton.constexpr_function
def is_number(quant):
    """Whether weights are stored as floats."""
    return quant in {"F32", "F16", "BF16"}


@triton.constexpr_function
def is_pairs(quant):
    """Whether a byte holds four codes of two bits."""
    return quant in {"Q2_K", "Q3_K", "TQ2_0"}


@triton.constexpr_function
def is_six_bit(quant):
    """Whether scales and minima have six bits."""
    return quant in {"Q4_K", "Q5_K"}


@triton.constexpr_function
def is_five_bit(quant):
    """Whether the fifth bits of a block are a word."""
    return quant in {"Q5_0", "Q5_1"}


@triton.jit
def columns_of(group, unit, part: tl.constexpr, QUANT: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr):
    """The columns (G, J) of the weights of groups (G,) and units (J,), of one part."""
    if is_six_bit(QUANT):
        start = group // 2 * 64 + part * 32 + group % 2 * 16
    elif QUANT == "Q6_K":
        start = group // 4 * 128 + part * 64 + group % 4 * 16
    elif is_pairs(QUANT):
        start = group // 2 * 128 + part * 32 + group % 2 * 16
    else:
        start = (group * PARTS + part) * UNITS
    return start[:, None] + unit[None, :]


@triton.jit
def existing(group, unit, groups, columns, QUANT: tl.constexpr, UNITS: tl.constexpr):
    """(G, J): which units of a row there are."""
    if is_number(QUANT):
        there = (group * UNITS)[:, None] + unit[None, :] < columns
    else:
        there = (group < groups)[:, None] & (unit < UNITS)[None, :]
    return there


@triton.jit
def load_codes(codes, row, group, unit, groups, columns, there, QUANT: tl.constexpr, UNITS: tl.constexpr):
    """The units of rows (R,), groups (G,) and units (J,): (R, G, J) as they are stored."""
    row_units = columns if is_number(QUANT) else groups * UNITS
    place = (group * UNITS)[:, None] + unit[None, :]
    return tl.load(codes + (row * row_units)[:, None, None] + place[None, :, :], mask=there[None, :, :], other=0)


@triton.jit
def load_high(codes, high, row, group, unit, groups, there, QUANT: tl.constexpr):
    """What holds the upper bits of the codes: bytes (R, G, J), words (R, G, 1), or nothing of use."""
    if is_five_bit(QUANT):
        words = tl.load(high + (row * groups)[:, None] + group[None, :], mask=(group < groups)[None, :], other=0)
        bits = words[:, :, None]
    elif QUANT == "Q3_K" or QUANT == "Q5_K" or QUANT == "Q6_K":
        shared = 8 if QUANT == "Q5_K" else 4  # groups that read the same 32 bytes
        row_bytes = groups * 4 if QUANT == "Q5_K" else groups * 8
        place = (group // shared * 32 + group % 2 * 16)[:, None] + unit[None, :]
        bytes_ = tl.load(high + (row * row_bytes)[:, None, None] + place[None, :, :], mask=there[None, :, :], other=0)
        bits = bytes_.to(tl.int32)
    else:
        bits = codes
    return bits


@triton.jit
def to_float(code, offset: tl.constexpr):
    """Integers from 0 to 2^23 - 1 minus an offset as float32."""
    return (code | _MAGIC).to(tl.float32, bitcast=True) - (_MAGIC_VALUE + offset)


@triton.jit
def code_values(codes, high, group, unit, part: tl.constexpr, QUANT: tl.constexpr):
    """The weights of one part before their scale: float32 (R, G, J), integers except for floats."""
    if QUANT == "F32" or QUANT == "F16":
        values = codes.to(tl.float32)
    elif QUANT == "BF16":
        values = (codes.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif QUANT == "Q8_0":
        values = to_float((codes.to(tl.int32) & 255) ^ 128, 128.0)
    elif is_pairs(QUANT):
        code = (codes.to(tl.int32) >> (2 * part)) & 3
        if QUANT == "Q2_K":
            values = to_float(code, 0.0)
        elif QUANT == "TQ2_0":
            values = to_float(code, 1.0)
        else:
            top = (high >> (group // 2 % 2 * 4 + part)[None, :, None]) & 1
            values = to_float(code | (top << 2), 4.0)
    else:
        code = (codes.to(tl.int32) >> (4 * part)) & 15
        if QUANT == "Q4_0":
            values = to_float(code, 8.0)
        elif is_five_bit(QUANT):
            top = (high >> (part * 16 + unit)[None, None, :]) & 1
            values = to_float(code | (top << 4), 16.0 if QUANT == "Q5_0" else 0.0)
        elif QUANT == "Q5_K":
            top = (high >> (group % 8 // 2 * 2 + part)[None, :, None]) & 1
            values = to_float(code | (top << 4), 0.0)
        elif QUANT == "Q6_K":
            top = (high >> (group % 4 // 2 * 2 + part * 4)[None, :, None]) & 3
            values = to_float(code | (top << 4), 32.0)
        elif QUANT == "IQ4_NL" or QUANT == "IQ4_XS":
            lower = tl.where(code < 4, _IQ4_WORDS[0], _IQ4_WORDS[1])
            upper = tl.where(code < 12, _IQ4_WORDS[2], _IQ4_WORDS[3])
            word = tl.where(code < 8, lower, upper)
            values = to_float((word >> ((code & 3) * 8)) & 255, 128.0)
        elif QUANT == "MXFP4":
            magnitude = (_E2M1_NIBBLES >> ((code & 7) * 4)) & 15
            values = to_float(tl.where(code < 8, 128 + magnitude, 128 - magnitude), 128.0)
        else:  # Q4_1, Q4_K
            values = to_float(code, 0.0)
    return values


@triton.jit
def group_scales(high, scales, scale, shift, row, group, part: tl.constexpr, groups, QUANT: tl.constexpr):
    """(scale, shift) of one part of rows (R,) and groups (G,), float32 (R, G) each.

    If the compiler does not know that groups follow each other, a thread loads the scales of its own groups, and
    nothing has to be moved between threads.
    """
    there = (group < groups)[None, :]
    no_shift = tl.zeros((row.shape[0], group.shape[0]), tl.float32)
    if is_number(QUANT):
        found = (no_shift + 1.0, no_shift)
    elif QUANT == "MXFP4":
        power = tl.load(scale + (row * groups)[:, None] + group[None, :], mask=there, other=0).to(tl.int32)
        bits = tl.where(power < 2, 0x00200000 << (power & 1), (power - 1) << 23)  # 2^(power - 128)
        found = (bits.to(tl.float32, bitcast=True), no_shift)
    elif is_pairs(QUANT):
        block = (row * (groups // 4))[:, None] + (group // 4)[None, :]
        d = tl.load(scale + block, mask=there, other=0).to(tl.float32)
        index = (group // 2 % 2 * 8 + part * 2 + group % 2)[None, :]  # of the 16 groups of 16 weights
        if QUANT == "TQ2_0":
            found = (d, no_shift)
        elif QUANT == "Q2_K":
            packed = tl.load(scales + block * 16 + index, mask=there, other=0).to(tl.int32)
            least = tl.load(shift + block, mask=there, other=0).to(tl.float32)
            found = (d * to_float(packed & 15, 0.0), -(least * to_float(packed >> 4, 0.0)))
        else:
            low = tl.load(scales + block * 3 + index % 8 // 4, mask=there, other=0) >> (index % 4 * 8 + index // 8 * 4)
            top = tl.load(scales + block * 3 + 2, mask=there, other=0) >> (index % 4 * 8 + index // 4 * 2)
            found = (d * to_float((low & 15) | ((top & 3) << 4), 32.0), no_shift)
    elif is_six_bit(QUANT):
        block = (row * (groups // 8))[:, None] + (group // 8)[None, :]
        index = (group % 8 // 2 * 2 + part)[None, :]
        byte = index % 4 * 8
        first = tl.load(scales + block * 3, mask=there, other=0) >> byte
        second = tl.load(scales + block * 3 + 1, mask=there, other=0) >> byte
        third = tl.load(scales + block * 3 + 2, mask=there, other=0) >> byte
        factor = tl.where(index < 4, first & 63, (third & 15) | (first >> 2 & 48))
        offset = tl.where(index < 4, second & 63, (third >> 4 & 15) | (second >> 2 & 48))
        d = tl.load(scale + block, mask=there, other=0).to(tl.float32)
        least = tl.load(shift + block, mask=there, other=0).to(tl.float32)
        found = (d * to_float(factor, 0.0), -(least * to_float(offset, 0.0)))
    elif QUANT == "Q6_K" or QUANT == "IQ4_XS":
        block = (row * (groups // 8))[:, None] + (group // 8)[None, :]
        d = tl.load(scale + block, mask=there, other=0).to(tl.float32)
        if QUANT == "Q6_K":
            index = (group // 4 % 2 * 8 + part * 4 + group % 4)[None, :]
            factor = tl.load(scales + block * 16 + index, mask=there, other=0).to(tl.float32)
        else:
            index = (group % 8)[None, :]
            low = tl.load(scales + block, mask=there, other=0) >> (index * 4)
            top = tl.load(high + block, mask=there, other=0).to(tl.int32) >> (index * 2)
            factor = to_float((low & 15) | ((top & 3) << 4), 32.0)
        found = (d * factor, no_shift)
    else:
        share = 2 if QUANT == "Q8_0" else 1
        place = (row * (groups // share))[:, None] + (group // share)[None, :]
        d = tl.load(scale + place, mask=there, other=0).to(tl.float32)
        if QUANT == "Q4_1" or QUANT == "Q5_1":
            found = (d, tl.load(shift + place, mask=there, other=0).to(tl.float32))
        else:
            found = (d, no_shift)
    return found
