"""Decoders of the types with one scale a block: 1 to 8 bits, ternary, and the two 4-bit floats.

Layouts: GGML's `ggml-common.h`; MXFP4: OCP Microscaling Formats 1.0. In the 32-weight types the low nibbles of a
block's bytes are its first half, the high nibbles its second.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.reference.dequantize_parts import Blocks, Decoder, Weights, field, half, planes, scale_groups

# E2M1 values, doubled so that they are integers; the scales of both types are halved in return.
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)


def _e8m0_halved() -> Weights:
    """2^(e - 128) of every byte e; the first two are subnormal."""
    return np.exp2(np.arange(256, dtype=np.float64) - 128).astype(np.float32)


def _ue4m3_halved() -> Weights:
    """Half of the unsigned E4M3 number (bias 7) of every byte; the top bit is ignored and NaN (0x7F) counts as 0."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7)) / 2
    value[0x7F] = 0
    scales: Weights = value.astype(np.float32)
    return scales


_E8M0 = _e8m0_halved()
_UE4M3 = _ue4m3_halved()
_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


def _nibbles(blocks: Blocks, start: int) -> NDArray[np.uint8]:
    """The 4-bit codes of a 32-weight block whose 16 bytes begin at `start`, (n, 32)."""
    return planes(field(blocks, start, "u1", 16)[:, None], (0, 4), 15).reshape(-1, 32)


def _fifth_bits(blocks: Blocks, start: int) -> NDArray[np.uint8]:
    """0 or 16 for each of 32 weights, from the 4 bytes at `start`, (n, 32)."""
    return np.unpackbits(field(blocks, start, "u1", 4), axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Blocks, out: Weights) -> None:
    np.subtract(_nibbles(blocks, 2), np.float32(8), out=out)
    out *= half(blocks, 0)


def _q4_1(blocks: Blocks, out: Weights) -> None:
    out[...] = _nibbles(blocks, 4)
    out *= half(blocks, 0)
    out += half(blocks, 2)


def _q5_0(blocks: Blocks, out: Weights) -> None:
    np.subtract(_nibbles(blocks, 6) | _fifth_bits(blocks, 2), np.float32(16), out=out)
    out *= half(blocks, 0)


def _q5_1(blocks: Blocks, out: Weights) -> None:
    out[...] = _nibbles(blocks, 8) | _fifth_bits(blocks, 4)
    out *= half(blocks, 0)
    out += half(blocks, 2)


def _q8_0(blocks: Blocks, out: Weights) -> None:
    np.multiply(field(blocks, 2, "i1", 32), half(blocks, 0), out=out)


def _q8_1(blocks: Blocks, out: Weights) -> None:
    """The second half-precision number is the sum of the block, which only dot products use."""
    np.multiply(field(blocks, 4, "i1", 32), half(blocks, 0), out=out)


def _q1_0(blocks: Blocks, out: Weights) -> None:
    """One bit a weight: d where it is set, -d where not."""
    bits = np.unpackbits(field(blocks, 2, "u1", 16), axis=1, bitorder="little")
    np.subtract(bits << 1, np.float32(1), out=out)
    out *= half(blocks, 0)


def _q2_0(blocks: Blocks, out: Weights) -> None:
    """Four consecutive weights a byte, lowest bits first: codes 0 to 3 are -1, 0, 1, 2."""
    codes = planes(field(blocks, 2, "u1", 16)[:, None], (0, 2, 4, 6), 3)[:, 0]  # (n, place in the byte, byte)
    np.subtract(codes.transpose(0, 2, 1), np.float32(1), out=out.reshape(-1, 16, 4))
    out *= half(blocks, 0)


def _trits(packed: NDArray[np.uint8], digits: int) -> NDArray[np.uint8]:
    """Base-3 digits of bytes that hold a fraction of 256, most significant first: (n, width) -> (n, digits * width)."""
    shifted = packed[:, None] * _POWERS_OF_3[:digits, None]  # wraps: what is above the point falls off
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)


def _tq1_0(blocks: Blocks, out: Weights) -> None:
    """32 and 16 bytes of five ternary digits, 4 bytes of four, each digit's run of bytes after the other."""
    for place, first, count, digits in ((0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4)):
        codes = _trits(field(blocks, first, "u1", count), digits)
        np.subtract(codes, np.float32(1), out=out[:, place : place + count * digits])
    out *= half(blocks, 52)


def _tq2_0(blocks: Blocks, out: Weights) -> None:
    codes = planes(field(blocks, 0, "u1", 64).reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    np.subtract(codes.reshape(-1, 256), np.float32(1), out=out)
    out *= half(blocks, 64)


def _mxfp4(blocks: Blocks, out: Weights) -> None:
    np.take(_E2M1_DOUBLED, _nibbles(blocks, 1), out=out, mode="clip")
    out *= _E8M0[blocks[:, :1]]


def _nvfp4(blocks: Blocks, out: Weights) -> None:
    """Four runs of 16 weights with a scale each; a run's 8 bytes hold its first half in their low nibbles."""
    codes = planes(field(blocks, 4, "u1", 32).reshape(-1, 4, 8), (0, 4), 15)
    np.take(_E2M1_DOUBLED, codes.reshape(-1, 64), out=out, mode="clip")
    scale_groups(out, _UE4M3[blocks[:, :4]])


DECODERS: Mapping[str, Decoder] = {
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q8_1": _q8_1,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
