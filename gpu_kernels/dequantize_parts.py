"""Pieces that the decoders of quant blocks share: a block's fields, bit fields, scaling of groups.

Knows nothing about single quant types. Every tensor has the blocks first: (n, numbers of a field), n being the blocks
of all rows together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gpu_kernels.layouts import layout


@dataclass(frozen=True, slots=True)
class Planes:
    """The fields of n blocks by name, each (n, count)."""

    fields: dict[str, torch.Tensor]

    @classmethod
    def of(cls, quant_type: str, planes: Sequence[torch.Tensor]) -> "Planes":
        """From planes (..., blocks of a row * count) in the order of the layout's fields."""
        fields = layout(quant_type).fields
        return cls({field.name: plane.reshape(-1, field.count) for field, plane in zip(fields, planes, strict=True)})

    def raw(self, name: str) -> torch.Tensor:
        """The numbers as they are stored."""
        return self.fields[name]

    def ints(self, name: str) -> torch.Tensor:
        """Bytes or 16-bit numbers as int32; unsigned whatever their stored type says."""
        numbers = self.fields[name].int()
        return numbers & 0xFFFF if self.fields[name].dtype == torch.int16 else numbers

    def half(self, name: str) -> torch.Tensor:
        """A float16 scale as float32, (n, 1)."""
        return self.fields[name].float()


Decoder = Callable[[Planes], torch.Tensor]  # -> float32 (n, block_size)


def bits(packed: torch.Tensor, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """Bit fields, plane by plane: (..., width) int32 -> (..., len(shifts), width)."""
    return torch.stack([packed >> shift for shift in shifts], dim=-2) & mask


def bits_inside(packed: torch.Tensor, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """Bit fields, number by number: (..., width) int32 -> (..., width * len(shifts))."""
    return (torch.stack([packed >> shift for shift in shifts], dim=-1) & mask).flatten(-2)


def scale_groups(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """codes * scale (- offset) for equal runs of a block: codes (n, block_size), scales and offsets (n, groups)."""
    groups = codes.float().view(*scales.shape, -1) * scales[:, :, None]
    if offsets is not None:
        groups = groups - offsets[:, :, None]
    return groups.flatten(1)
