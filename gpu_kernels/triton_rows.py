# ruff: noqa: N803, PLR1714  what kernels fix at compile time is upper case, and their language is a part of Python's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"
"""Parts of Triton kernels: rows of keys and values on their way into blocks and out of them.

Rounds as `cpu_kernels.kv_encode` does, to the bit, if nothing is fused: a product that is rounded again must have been
rounded itself. Codes of 4 bits come in the order of bytes, the lower one first: `dims_of` tells the dimensions of a
vector's places, which stay in their group of 32. Knows nothing about what rows are for.
"""

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest, of two to the even one
_GROUP = tl.constexpr(32)
_WIDE = tl.constexpr(127)
_MOST_BITS = tl.constexpr(10)  # of the number of a dimension


@triton.jit
def dims_of(D: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr):
    """The dimension of every place in a vector of D that `load_rows` gives."""
    place = tl.arange(0, D)
    if KIND == "q4_0":
        apart: tl.constexpr = STEP // 2
        place = place // STEP * STEP + place // 2 % apart + place % 2 * apart
    return place


@triton.jit
def turned(x, ROWS: tl.constexpr, D: tl.constexpr, LENGTH: tl.constexpr):
    """x (ROWS, D) float32, of which LENGTH dimensions are not 0, times the orthogonal Walsh-Hadamard matrix.

    LENGTH is a power of two. What comes out behind LENGTH is of no use.
    """
    for bit in tl.static_range(_MOST_BITS):
        if 1 << bit < D:
            pairs = tl.reshape(x, (ROWS, D >> bit + 1, 2, 1 << bit))
            low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), (ROWS, D))
    return x * LENGTH**-0.5


@triton.jit
def load_rows(
    numbers,
    scales,
    row,
    there,
    LENGTH: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """(N, D) of rows (N,) of heads: float16 as they are, other types float32; zeros where there is none.

    `numbers` is a matrix (rows, numbers of a row), of bfloat16 the bits; `scales` (rows, groups).
    """
    if KIND == "q8_0" or KIND == "q4_0":
        codes = _load_codes(numbers, row, there, LENGTH, KIND, STEP, N, D)
        groups: tl.constexpr = (LENGTH + _GROUP - 1) // _GROUP
        group = tl.arange(0, D // _GROUP)
        known = there[:, None] & (group < groups)[None, :]
        scale = tl.load(scales + row[:, None] * groups + group[None, :], mask=known, other=0.0).to(tl.float32)
        held = tl.reshape(tl.reshape(codes, (N, D // _GROUP, _GROUP)) * scale[:, :, None], (N, D))
    else:
        dim = tl.arange(0, D)
        known = there[:, None] & (dim < LENGTH)[None, :]
        held = tl.load(numbers + row[:, None] * LENGTH + dim[None, :], mask=known, other=0)
        if KIND == "bf16":
            held = (held.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return held


@triton.jit
def _load_codes(
    numbers,
    row,
    there,
    LENGTH: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """(N, D) float32: codes as the integers they stand for."""
    padded: tl.constexpr = (LENGTH + STEP - 1) // STEP * STEP
    if KIND == "q8_0":
        place = tl.arange(0, D)
        known = there[:, None] & (place < LENGTH)[None, :]
        codes = tl.load(numbers + row[:, None] * padded + place[None, :], mask=known, other=0).to(tl.float32)
    else:
        byte = tl.arange(0, D // 2)
        known = there[:, None] & (byte < padded // 2)[None, :]
        pair = tl.load(numbers + row[:, None] * (padded // 2) + byte[None, :], mask=known, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(pair & 15, pair >> 4), (N, D)).to(tl.float32) - 8.0
        if LENGTH // _GROUP * _GROUP < LENGTH:
            codes = tl.where((dims_of(D, KIND, STEP) < LENGTH)[None, :], codes, 0.0)
    return codes


@triton.jit
def store_row(numbers, scales, row, x, LENGTH: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr):
    """x (D,) float32, zeros behind LENGTH, becomes a row."""
    dim = tl.arange(0, D)
    if KIND == "q8_0" or KIND == "q4_0":
        _store_codes(numbers, scales, row, x, LENGTH, KIND, STEP, D)
    elif KIND == "bf16":
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        kept = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, nearest)
        tl.store(numbers + row * LENGTH + dim, kept.to(tl.int16), mask=dim < LENGTH)
    else:
        tl.store(numbers + row * LENGTH + dim, x.to(tl.float16), mask=dim < LENGTH)


@triton.jit
def _store_codes(
    numbers, scales, row, x, LENGTH: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr
):
    """See `gpu_kernels.blocks.KVRows`."""
    count: tl.constexpr = D // _GROUP
    groups: tl.constexpr = (LENGTH + _GROUP - 1) // _GROUP
    padded: tl.constexpr = (LENGTH + STEP - 1) // STEP * STEP
    group, lane = tl.arange(0, count), tl.arange(0, _GROUP)
    dim = group[:, None] * _GROUP + lane[None, :]
    x = tl.reshape(x, (count, _GROUP))
    if LENGTH // _GROUP * _GROUP < LENGTH:
        first = tl.sum(tl.where((lane == 0)[None, :], x, 0.0), axis=1)
        x = tl.where(dim < LENGTH, x, first[:, None])
    low, high = tl.min(x, axis=1), tl.max(x, axis=1)
    scale = tl.maximum(high, -low) * (1 / _WIDE) if KIND == "q8_0" else tl.where(-low >= high, low, high) * -0.125
    scale = (scale + tl.sum(x * 0.0, axis=1)).to(tl.float16)  # not finite where a number is not
    tl.store(scales + row * groups + group, scale, mask=group < groups)
    rounded = scale.to(tl.float32)
    is_zero = rounded == 0.0
    factor = tl.where(is_zero, 0.0, tl.div_rn(tl.full((count,), 1.0, tl.float32), tl.where(is_zero, 1.0, rounded)))
    code = (x * factor[:, None] + _ROUND) - _ROUND
    if KIND == "q8_0":
        code = tl.minimum(tl.maximum(code, -_WIDE), _WIDE).to(tl.int32)
    else:
        code = tl.minimum(tl.maximum(code, -8.0), 7.0).to(tl.int32) + 8
    if STEP < _GROUP:
        code = tl.where(dim < LENGTH, code, 0)
    if KIND == "q8_0":
        tl.store(numbers + row * padded + dim, code.to(tl.int8), mask=dim < padded)
    else:
        parts = tl.permute(tl.reshape(code, (D // STEP, 2, STEP // 2)), (0, 2, 1))
        low_code, high_code = tl.split(parts)
        pair = tl.reshape(low_code | (high_code << 4), (D // 2,))
        byte = tl.arange(0, D // 2)
        tl.store(numbers + row * (padded // 2) + byte, pair.to(tl.uint8), mask=byte < padded // 2)
