"""Decoders of the IQ types: groups of 4 or 8 weights are entries of a codebook, with signs or a shift beside them.

Layouts: GGML's `ggml-common.h`. The codebooks are facts of the format and come from the `gguf` package, which is
imported when the first of them is needed. IQ4_NL and IQ4_XS have a table of 16 values instead.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.reference.dequantize_parts import Blocks, Decoder, Weights, field, half, planes, scale_groups

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
_IQ1_SHIFT = np.float32(0.125)
# (256, 8): the sign of weight i of a group is -1 where bit i of its byte is set.
_SIGNS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)
_SEVEN_BIT_SIGNS = np.array([code | (code.bit_count() & 1) << 7 for code in range(128)], dtype=np.uint8)  # even parity


@cache
def codebook(name: str) -> Weights:
    """The codebook of an IQ type, float32 of shape (entries, 4 or 8)."""
    from gguf import quants  # noqa: PLC0415 - heavy, and needed by few models

    holder = getattr(quants, name)
    holder.init_grid()
    grid: Weights = np.ascontiguousarray(holder.grid.reshape(holder.grid_shape), dtype=np.float32)
    grid.setflags(write=False)
    return grid


def _look_up(out: Weights, name: str, index: NDArray[np.integer]) -> None:
    """Puts the entries of a codebook one after another; `index` of shape (n, groups)."""
    grid = codebook(name)
    np.take(grid, index, axis=0, out=out.reshape(*index.shape, grid.shape[1]), mode="clip")


def _apply_signs(out: Weights, signs: NDArray[np.uint8]) -> None:
    """`signs` holds a byte for every 8 weights, (n, 32)."""
    groups = out.reshape(*signs.shape, 8)
    groups *= _SIGNS[signs]


def _unpack_signs(packed: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Four 7-bit sign codes from the low 28 bits of each number: (n, 8) -> (n, 32) bytes of 8 signs."""
    shifts = np.array([0, 7, 14, 21], dtype=np.uint32)
    codes = (packed[:, :, None] >> shifts & 127).reshape(len(packed), -1)
    return np.take(_SEVEN_BIT_SIGNS, codes)


def _nibble_pairs(blocks: Blocks, start: int, count: int) -> NDArray[np.uint8]:
    """Nibbles of `count` bytes, low before high: (n, 2 * count)."""
    packed = field(blocks, start, "u1", count)
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _high_bits(packed: NDArray[np.unsignedinteger], shifts: tuple[int, ...], mask: int) -> NDArray[np.uint16]:
    """Bit fields placed above a byte: (n, m) -> (n, m * len(shifts)) of field * 256."""
    fields = packed.astype(np.uint16)[:, :, None] >> np.array(shifts, dtype=np.uint16) & np.uint16(mask)
    return (fields << np.uint16(8)).reshape(len(packed), -1)


def _iq2_xxs(blocks: Blocks, out: Weights) -> None:
    """For every 32 weights: 4 entries, then 4 sign codes and a 4-bit scale in one 32-bit number."""
    entries = field(blocks, 2, "u1", 64).reshape(-1, 8, 8)
    packed = field(blocks, 2, "<u4", 16)[:, 1::2]
    _look_up(out, "IQ2_XXS", entries[:, :, :4].reshape(-1, 32))
    scale_groups(out, half(blocks, 0) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.25))
    _apply_signs(out, _unpack_signs(packed))


def _iq2_scales(blocks: Blocks, start: int) -> Weights:
    """The 16 scales of a block of IQ2_XS or IQ2_S from 8 bytes, (n, 16)."""
    return half(blocks, 0) * (np.float32(0.5) + _nibble_pairs(blocks, start, 8)) * np.float32(0.25)


def _iq2_xs(blocks: Blocks, out: Weights) -> None:
    """32 numbers of 9 bits of entry and 7 of signs, 8 bytes of scales."""
    packed = field(blocks, 2, "<u2", 32)
    _look_up(out, "IQ2_XS", packed & 511)
    scale_groups(out, _iq2_scales(blocks, 66))
    _apply_signs(out, np.take(_SEVEN_BIT_SIGNS, packed >> 9))


def _iq2_s(blocks: Blocks, out: Weights) -> None:
    """32 low bytes of entries, 32 of signs, 8 of the entries' two high bits, 8 of scales."""
    high = _high_bits(field(blocks, 66, "u1", 8), (0, 2, 4, 6), 3)
    _look_up(out, "IQ2_S", field(blocks, 2, "u1", 32) | high)
    scale_groups(out, _iq2_scales(blocks, 74))
    _apply_signs(out, field(blocks, 34, "u1", 32))


def _iq3_xxs(blocks: Blocks, out: Weights) -> None:
    """64 entries, 8 numbers of 4 sign codes and a 4-bit scale."""
    packed = field(blocks, 66, "<u4", 8)
    _look_up(out, "IQ3_XXS", field(blocks, 2, "u1", 64))
    scale_groups(out, half(blocks, 0) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.5))
    _apply_signs(out, _unpack_signs(packed))


def _iq3_s(blocks: Blocks, out: Weights) -> None:
    """64 low bytes of entries, 8 of their ninth bits, 32 of signs, 4 of scales."""
    high = _high_bits(field(blocks, 66, "u1", 8), tuple(range(8)), 1)
    _look_up(out, "IQ3_S", field(blocks, 2, "u1", 64) | high)
    scale_groups(out, half(blocks, 0) * (np.float32(1) + np.float32(2) * _nibble_pairs(blocks, 106, 4)))
    _apply_signs(out, field(blocks, 74, "u1", 32))


def _iq1_s(blocks: Blocks, out: Weights) -> None:
    """32 low bytes of entries; for every 32 weights 16 bits: 4 x 3 high bits, a 3-bit scale, the sign of the shift."""
    packed = field(blocks, 34, "<u2", 8)
    _look_up(out, "IQ1_S", field(blocks, 2, "u1", 32) | _high_bits(packed, (0, 3, 6, 9), 7))
    groups = out.reshape(-1, 8, 32)
    groups += np.where(packed & 0x8000, -_IQ1_SHIFT, _IQ1_SHIFT)[:, :, None]
    scale_groups(out, half(blocks, 0) * ((packed >> 12 & 7) * np.float32(2) + np.float32(1)))


def _iq1_m(blocks: Blocks, out: Weights) -> None:
    """32 low bytes of entries, 16 of (3 high bits, sign of the shift) pairs, 4 numbers of four 3-bit scales.

    The block's float16 scale is spread over the top nibbles of those four numbers, lowest first.
    """
    high = np.stack([field(blocks, 32, "u1", 16) & 15, field(blocks, 32, "u1", 16) >> 4], axis=2).reshape(-1, 32)
    _look_up(out, "IQ1_M", field(blocks, 0, "u1", 32) | (high & 7).astype(np.uint16) << 8)
    groups = out.reshape(-1, 32, 8)
    groups += np.where(high & 8, -_IQ1_SHIFT, _IQ1_SHIFT)[:, :, None]
    packed = field(blocks, 48, "<u2", 4)
    nibbles = (packed >> 12) << np.array([0, 4, 8, 12], dtype=np.uint16)
    d = np.bitwise_or.reduce(nibbles, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    scales = (packed[:, :, None] >> np.array([0, 3, 6, 9], dtype=np.uint16) & 7).reshape(-1, 16)
    scale_groups(out, d * (scales * np.float32(2) + np.float32(1)))


def _iq4_nl(blocks: Blocks, out: Weights) -> None:
    codes = planes(field(blocks, 2, "u1", 16)[:, None], (0, 4), 15)
    np.take(_IQ4_VALUES, codes.reshape(-1, 32), out=out, mode="clip")
    out *= half(blocks, 0)


def _iq4_xs(blocks: Blocks, out: Weights) -> None:
    """d, 16 bits of the eight scales' two high bits, 4 bytes of their low nibbles, 128 of codes; offset 32."""
    high = field(blocks, 2, "<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (_nibble_pairs(blocks, 4, 4) | high << 4) - np.float32(32)
    codes = planes(field(blocks, 8, "u1", 128).reshape(-1, 8, 16), (0, 4), 15)
    np.take(_IQ4_VALUES, codes.reshape(-1, 256), out=out, mode="clip")
    scale_groups(out, half(blocks, 0) * scales.astype(np.float32))


DECODERS: Mapping[str, Decoder] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
