"""Decoders of the K-quants: 256 weights a block, in groups of 16 or 32 whose scales are themselves quantised.

Layouts: GGML's `ggml-common.h`. The order of multiplications is that of GGML's own decoders, so that results are
equal to the bit.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.reference.dequantize_parts import Blocks, Decoder, Weights, field, half, planes, scale_groups

_EIGHT_BITS = range(8)
_PAIRS = (0, 2, 4, 6)


def _q2_k(blocks: Blocks, out: Weights) -> None:
    """16 bytes of scales (low nibble) and mins (high), 64 of codes, d, dmin."""
    scales = field(blocks, 0, "u1", 16)
    out[...] = planes(field(blocks, 16, "u1", 64).reshape(-1, 2, 32), _PAIRS, 3).reshape(-1, 256)
    scale_groups(out, half(blocks, 80) * (scales & 15), half(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Blocks, out: Weights) -> None:
    """32 bytes of high bits, 64 of low codes, 12 of scales, d; a clear high bit subtracts 4."""
    codes = planes(field(blocks, 32, "u1", 64).reshape(-1, 2, 32), _PAIRS, 3).reshape(-1, 8, 32)
    codes |= planes(field(blocks, 0, "u1", 32)[:, None], _EIGHT_BITS, 1)[:, 0] << 2
    np.subtract(codes.reshape(-1, 256), np.float32(4), out=out)
    low = planes(field(blocks, 96, "u1", 8)[:, None], (0, 4), 15).reshape(-1, 16)
    high = planes(field(blocks, 104, "u1", 4)[:, None], _PAIRS, 3).reshape(-1, 16)
    scale_groups(out, half(blocks, 108) * np.subtract(low | high << 4, np.float32(32)))


def _six_bit_scales(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Eight scales and eight mins of 6 bits from 12 bytes, (n, 12) -> two of (n, 8).

    The first four of each fill the low 6 bits of bytes 0-3 and 4-7; the last four have their low nibbles in bytes 8-11
    and their two high bits above those of the first four.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, mins


def _scale_and_shift(blocks: Blocks, out: Weights) -> None:
    """out = d * scale * out - dmin * min, for Q4_K and Q5_K, whose blocks begin alike: d, dmin, 12 bytes of scales."""
    scales, mins = _six_bit_scales(field(blocks, 4, "u1", 12))
    scale_groups(out, half(blocks, 0) * scales, half(blocks, 2) * mins)


def _q4_k(blocks: Blocks, out: Weights) -> None:
    out[...] = planes(field(blocks, 16, "u1", 128).reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 256)
    _scale_and_shift(blocks, out)


def _q5_k(blocks: Blocks, out: Weights) -> None:
    """As Q4_K with 32 bytes of fifth bits, bit g for group g, before the nibbles."""
    codes = planes(field(blocks, 48, "u1", 128).reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    codes |= planes(field(blocks, 16, "u1", 32)[:, None], _EIGHT_BITS, 1)[:, 0] << 4
    out[...] = codes.reshape(-1, 256)
    _scale_and_shift(blocks, out)


def _q6_k(blocks: Blocks, out: Weights) -> None:
    """128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d; codes have an offset of 32."""
    codes = planes(field(blocks, 0, "u1", 128).reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 2, 4, 32)
    codes |= planes(field(blocks, 128, "u1", 64).reshape(-1, 2, 32), _PAIRS, 3) << 4
    np.subtract(codes.reshape(-1, 256), np.float32(32), out=out)
    scale_groups(out, half(blocks, 208) * field(blocks, 192, "i1", 16))


def _q8_k(blocks: Blocks, out: Weights) -> None:
    """A float32 scale and 256 signed bytes; the sums that follow are for dot products."""
    np.multiply(field(blocks, 4, "i1", 256), field(blocks, 0, "<f4"), out=out)


DECODERS: Mapping[str, Decoder] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": _q8_k,
}
