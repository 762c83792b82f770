"""Decoders of the IQ types: groups of 4 or 8 weights are entries of a codebook, with signs or a shift beside them.

Layouts: GGML's `ggml-common.h`. The codebooks are facts of the format and come from the `gguf` package, which is
imported when the first of them is needed.
"""

from collections.abc import Mapping
from functools import cache

import torch

from gpu_kernels.dequantize_parts import Decoder, Planes, bits_inside, scale_groups

_IQ1_SHIFT = 0.125
_SEVEN_BIT_SIGNS = [code | (code.bit_count() & 1) << 7 for code in range(128)]  # even parity


@cache
def codebook(name: str, device: torch.device) -> torch.Tensor:
    """The codebook of an IQ type, float32 (entries, 4 or 8)."""
    from gguf import quants  # noqa: PLC0415  heavy, and needed by few models

    holder = getattr(quants, name)
    holder.init_grid()
    return torch.tensor(holder.grid, dtype=torch.float32, device=device).reshape(holder.grid_shape)


def _entries(name: str, index: torch.Tensor) -> torch.Tensor:
    """The entries of a codebook side by side: index (n, groups) -> (n, 256)."""
    return codebook(name, index.device)[index].flatten(1)


def _signed(weights: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """`signs`: a byte for every 8 weights, (n, 32); a set bit negates."""
    return weights * (1 - 2 * bits_inside(signs, range(8), 1)).float()


def _unfold_signs(codes: torch.Tensor) -> torch.Tensor:
    """Seven-bit sign codes to bytes."""
    return torch.tensor(_SEVEN_BIT_SIGNS, dtype=torch.int32, device=codes.device)[codes]


def _four_codes(packed: torch.Tensor) -> torch.Tensor:
    """The four sign codes of each 32-bit number: (n, 8) -> (n, 32)."""
    return _unfold_signs(bits_inside(packed, (0, 7, 14, 21), 127))


def _top(packed: torch.Tensor) -> torch.Tensor:
    """The top nibbles of 32-bit numbers."""
    return (packed >> 28 & 15).float()


def _nibble_scales(blocks: Planes) -> torch.Tensor:
    return bits_inside(blocks.ints("scales"), (0, 4), 15).float()


def _iq2_xxs(blocks: Planes) -> torch.Tensor:
    """For every 32 weights: 4 entries in one 32-bit number, then 4 sign codes and a 4-bit scale in another."""
    numbers = blocks.raw("codes")
    index, packed = bits_inside(numbers[:, 0::2], (0, 8, 16, 24), 255), numbers[:, 1::2]
    scales = blocks.half("scale") * (0.5 + _top(packed)) * 0.25
    return _signed(scale_groups(_entries("IQ2_XXS", index), scales), _four_codes(packed))


def _iq2_scales(blocks: Planes) -> torch.Tensor:
    return blocks.half("scale") * (0.5 + _nibble_scales(blocks)) * 0.25


def _iq2_xs(blocks: Planes) -> torch.Tensor:
    """32 numbers of 9 bits of entry and 7 of signs."""
    packed = blocks.ints("codes")
    weights = scale_groups(_entries("IQ2_XS", packed & 511), _iq2_scales(blocks))
    return _signed(weights, _unfold_signs(packed >> 9))


def _iq2_s(blocks: Planes) -> torch.Tensor:
    """Low bytes of entries, two high bits each, bytes of signs."""
    index = blocks.ints("codes") | bits_inside(blocks.ints("high"), (0, 2, 4, 6), 3) << 8
    return _signed(scale_groups(_entries("IQ2_S", index), _iq2_scales(blocks)), blocks.ints("signs"))


def _iq3_xxs(blocks: Planes) -> torch.Tensor:
    """64 entries, 8 numbers of 4 sign codes and a 4-bit scale."""
    packed = blocks.raw("signs")
    scales = blocks.half("scale") * (0.5 + _top(packed)) * 0.5
    return _signed(scale_groups(_entries("IQ3_XXS", blocks.ints("codes")), scales), _four_codes(packed))


def _iq3_s(blocks: Planes) -> torch.Tensor:
    """Low bytes of entries, a ninth bit each, bytes of signs."""
    index = blocks.ints("codes") | bits_inside(blocks.ints("high"), range(8), 1) << 8
    scales = blocks.half("scale") * (1 + 2 * _nibble_scales(blocks))
    return _signed(scale_groups(_entries("IQ3_S", index), scales), blocks.ints("signs"))


def _shifts(negative: torch.Tensor) -> torch.Tensor:
    return torch.where(negative != 0, -_IQ1_SHIFT, _IQ1_SHIFT)[:, :, None]


def _iq1_s(blocks: Planes) -> torch.Tensor:
    """Low bytes of entries; for every 32 weights 16 bits: 4 x 3 high bits, a 3-bit scale, the sign of the shift."""
    packed = blocks.ints("high")
    index = blocks.ints("codes") | bits_inside(packed, (0, 3, 6, 9), 7) << 8
    shifted = _entries("IQ1_S", index).view(-1, 8, 32) + _shifts(packed & 0x8000)
    return scale_groups(shifted.flatten(1), blocks.half("scale") * ((packed >> 12 & 7) * 2 + 1).float())


def _iq1_m(blocks: Planes) -> torch.Tensor:
    """Low bytes of entries, nibbles of 3 high bits and the sign of the shift, 4 numbers of four 3-bit scales.

    The block's float16 scale is spread over the top nibbles of those four numbers, lowest first.
    """
    high = bits_inside(blocks.ints("high"), (0, 4), 15)
    index = blocks.ints("codes") | (high & 7) << 8
    shifted = _entries("IQ1_M", index).view(-1, 32, 8) + _shifts(high & 8)
    packed = blocks.ints("scales")
    nibbles = (packed >> 12) << torch.arange(0, 16, 4, device=packed.device)
    d = nibbles.sum(1, keepdim=True).to(torch.int16).view(torch.float16).float()
    scales = bits_inside(packed, (0, 3, 6, 9), 7)
    return scale_groups(shifted.flatten(1), d * (scales * 2 + 1).float())


DECODERS: Mapping[str, Decoder] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
