"""Decoders of plain numbers and of the types with one scale a block: 1 to 8 bits, ternary, the 4-bit floats.

Layouts: GGML's `ggml-common.h`; MXFP4: OCP Microscaling Formats 1.0. In the 32-weight types the low nibbles of a
block's bytes are its first half, the high nibbles its second.
"""

from collections.abc import Mapping

import torch

from gpu_kernels.dequantize_parts import Decoder, Planes, bits, bits_inside, scale_groups

# E2M1 values, doubled so that they are integers; the scales of both types are halved in return.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _table(values: tuple[int, ...], codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes]


def _nibbles(blocks: Planes) -> torch.Tensor:
    """The 4-bit codes of 32-weight blocks, (n, 32)."""
    return bits(blocks.ints("codes"), (0, 4), 15).flatten(1)


def _fifth_bits(blocks: Planes) -> torch.Tensor:
    """0 or 16 for each of 32 weights."""
    return bits_inside(blocks.ints("high"), range(8), 1) << 4


def _bf16(blocks: Planes) -> torch.Tensor:
    return blocks.raw("codes").view(torch.bfloat16).float()


def _q5_0(blocks: Planes) -> torch.Tensor:
    return ((_nibbles(blocks) | _fifth_bits(blocks)).float() - 16) * blocks.half("scale")


def _q5_1(blocks: Planes) -> torch.Tensor:
    return (_nibbles(blocks) | _fifth_bits(blocks)).float() * blocks.half("scale") + blocks.half("shift")


def _q1_0(blocks: Planes) -> torch.Tensor:
    """One bit a weight: d where it is set, -d where not."""
    return (bits_inside(blocks.ints("codes"), range(8), 1) * 2 - 1).float() * blocks.half("scale")


def _q2_0(blocks: Planes) -> torch.Tensor:
    """Four consecutive weights a byte, lowest bits first: codes 0 to 3 are -1, 0, 1, 2."""
    return (bits_inside(blocks.ints("codes"), (0, 2, 4, 6), 3) - 1).float() * blocks.half("scale")


def _trits(packed: torch.Tensor, digits: int) -> torch.Tensor:
    """Base-3 digits of bytes that hold a fraction of 256, most significant first: (n, width) -> (n, digits * width)."""
    shifted = torch.stack([packed * 3**digit & 255 for digit in range(digits)], dim=-2)
    return (shifted * 3 >> 8).flatten(1)


def _tq1_0(blocks: Planes) -> torch.Tensor:
    """32 and 16 bytes of five ternary digits, 4 bytes of four, each digit's run of bytes after the other."""
    codes, rest = blocks.ints("codes"), blocks.ints("rest")
    digits = torch.cat([_trits(codes[:, :32], 5), _trits(codes[:, 32:], 5), _trits(rest, 4)], dim=1)
    return (digits - 1).float() * blocks.half("scale")


def _tq2_0(blocks: Planes) -> torch.Tensor:
    codes = bits(blocks.ints("codes").view(-1, 2, 32), (0, 2, 4, 6), 3).flatten(1)
    return (codes - 1).float() * blocks.half("scale")


def _mxfp4(blocks: Planes) -> torch.Tensor:
    """The scale is 2^(e - 128) of its byte e; the first two are subnormal."""
    scales = torch.exp2(torch.arange(256, dtype=torch.float64) - 128).float().to(blocks.raw("scale").device)
    return _table(E2M1_DOUBLED, _nibbles(blocks)) * scales[blocks.ints("scale")]


def _ue4m3_halved() -> torch.Tensor:
    """Half of the unsigned E4M3 number (bias 7) of every byte; the top bit is ignored and NaN (0x7F) counts as 0."""
    code = torch.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7).double()
    value = torch.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * torch.exp2(exponent.double() - 7)) / 2
    value[0x7F] = 0
    return value.float()


def _nvfp4(blocks: Planes) -> torch.Tensor:
    """Four runs of 16 weights with a scale each; a run's 8 bytes hold its first half in their low nibbles."""
    codes = bits(blocks.ints("codes").view(-1, 4, 8), (0, 4), 15).flatten(1)
    scales = _ue4m3_halved().to(codes.device)[blocks.ints("scales")]
    return scale_groups(_table(E2M1_DOUBLED, codes), scales)


DECODERS: Mapping[str, Decoder] = {
    "F32": lambda blocks: blocks.raw("codes"),
    "F16": lambda blocks: blocks.half("codes"),
    "BF16": _bf16,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "Q4_0": lambda blocks: (_nibbles(blocks) - 8).float() * blocks.half("scale"),
    "Q4_1": lambda blocks: _nibbles(blocks).float() * blocks.half("scale") + blocks.half("shift"),
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": lambda blocks: blocks.half("codes") * blocks.half("scale"),
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "IQ4_NL": lambda blocks: _table(IQ4_VALUES, _nibbles(blocks)) * blocks.half("scale"),
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
