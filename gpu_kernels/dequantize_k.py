"""Decoders of the types with 256 weights a block in groups whose scales are themselves quantised, without codebooks.

Layouts: GGML's `ggml-common.h`. The order of multiplications is that of GGML's own decoders.
"""

from collections.abc import Mapping

import torch

from gpu_kernels.dequantize_parts import Decoder, Planes, bits, bits_inside, scale_groups
from gpu_kernels.dequantize_simple import IQ4_VALUES

_PAIRS = (0, 2, 4, 6)


def _q2_k(blocks: Planes) -> torch.Tensor:
    """A scale (low nibble) and a minimum (high) for every 16 weights."""
    scales = blocks.ints("scales")
    codes = bits(blocks.ints("codes").view(-1, 2, 32), _PAIRS, 3).flatten(1)
    return scale_groups(codes, blocks.half("scale") * (scales & 15), blocks.half("shift") * (scales >> 4))


def _q3_k(blocks: Planes) -> torch.Tensor:
    """A clear high bit subtracts 4; 16 scales of 6 bits with an offset of 32."""
    codes = bits(blocks.ints("codes").view(-1, 2, 32), _PAIRS, 3).flatten(1)
    high = bits(blocks.ints("high"), range(8), 1).flatten(1)
    packed = blocks.ints("scales")
    low = bits(packed[:, :8], (0, 4), 15).flatten(1)
    top = bits(packed[:, 8:], _PAIRS, 3).flatten(1)
    scales = blocks.half("scale") * ((low | top << 4) - 32)
    return scale_groups((codes | high << 2) - 4, scales)


def _six_bit_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits from 12 bytes, (n, 12) -> two of (n, 8).

    The first four of each fill the low 6 bits of bytes 0-3 and 4-7; the last four have their low nibbles in bytes 8-11
    and their two high bits above those of the first four.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return scales, minima


def _scale_and_shift(blocks: Planes, codes: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bit_scales(blocks.ints("scales"))
    return scale_groups(codes, blocks.half("scale") * scales, blocks.half("shift") * minima)


def _nibbles(blocks: Planes) -> torch.Tensor:
    """Runs of 32 bytes, whose low nibbles come before their high ones: (n, 256)."""
    return bits(blocks.ints("codes").view(-1, 4, 32), (0, 4), 15).flatten(1)


def _q5_k(blocks: Planes) -> torch.Tensor:
    """As Q4_K with a fifth bit: bit g of 32 bytes for group g."""
    high = bits(blocks.ints("high"), range(8), 1).flatten(1)
    return _scale_and_shift(blocks, _nibbles(blocks) | high << 4)


def _q6_k(blocks: Planes) -> torch.Tensor:
    """Low nibbles, high pairs, a signed scale for every 16 weights; codes have an offset of 32."""
    low = bits(blocks.ints("codes").view(-1, 2, 64), (0, 4), 15).flatten(1)
    high = bits(blocks.ints("high").view(-1, 2, 32), _PAIRS, 3).flatten(1)
    return scale_groups((low | high << 4) - 32, blocks.half("scale") * blocks.ints("scales"))


def _iq4_xs(blocks: Planes) -> torch.Tensor:
    """Eight scales, low nibbles in 4 bytes and two high bits each in 16 bits, with an offset of 32."""
    high = blocks.ints("high") >> torch.arange(0, 16, 2, device=blocks.raw("high").device) & 3
    scales = (bits_inside(blocks.ints("scales"), (0, 4), 15) | high << 4) - 32
    codes = bits(blocks.ints("codes").view(-1, 8, 16), (0, 4), 15).flatten(1)
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)[codes]
    return scale_groups(values, blocks.half("scale") * scales)


DECODERS: Mapping[str, Decoder] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": lambda blocks: _scale_and_shift(blocks, _nibbles(blocks)),
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}
