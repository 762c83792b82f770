"""How kernels cut the rows of a quant type into units and groups, and which plane plays which role.

Knows nothing about products; the codes themselves are told by `triton_decode`, which reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from gpu_kernels.matrix import GpuMatrix


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a quant type's row is cut: weights a unit, units a group, groups a quant block (0: single numbers).

    A unit is one stored number of the plane of codes; it holds the codes of `parts` weights. A group is a run of units.
    """

    parts: int
    units: int
    block_groups: int
    words: tuple[str, ...] = ()  # fields of bytes that are read as 32-bit words

    def groups(self, columns: int) -> int:
        """Groups of a row, the last one perhaps cut where the type has single numbers."""
        return -(-columns // (self.parts * self.units))


_NIBBLES = Decoding(parts=2, units=16, block_groups=1)
_FIVE_BITS = Decoding(parts=2, units=16, block_groups=1, words=("high",))
_SIX_BIT_SCALES = Decoding(parts=2, units=16, block_groups=8, words=("scales",))

DECODINGS: Mapping[str, Decoding] = MappingProxyType(
    {
        "F32": Decoding(parts=1, units=4, block_groups=0),
        **dict.fromkeys(("F16", "BF16"), Decoding(parts=1, units=8, block_groups=0)),
        **dict.fromkeys(("Q4_0", "Q4_1", "IQ4_NL", "MXFP4"), _NIBBLES),
        **dict.fromkeys(("Q5_0", "Q5_1"), _FIVE_BITS),
        "Q8_0": Decoding(parts=1, units=16, block_groups=2),
        **dict.fromkeys(("Q2_K", "TQ2_0"), Decoding(parts=4, units=16, block_groups=4)),
        "Q3_K": Decoding(parts=4, units=16, block_groups=4, words=("scales",)),
        **dict.fromkeys(("Q4_K", "Q5_K"), _SIX_BIT_SCALES),
        "Q6_K": Decoding(parts=2, units=16, block_groups=8),
        "IQ4_XS": Decoding(parts=2, units=16, block_groups=8, words=("scales",)),
    }
)
ROLES = ("codes", "high", "scales", "scale", "shift")  # of planes, in the order of kernels' arguments


def planes_by_role(matrix: GpuMatrix) -> tuple[torch.Tensor, ...]:
    """The planes in the order of `ROLES`; those that a type has not repeat the codes."""
    held = {field.name: plane for field, plane in zip(matrix.layout.fields, matrix.planes, strict=True)}
    for name in DECODINGS[matrix.quant_type].words:
        held[name] = held[name].view(torch.int32)
    return tuple(held.get(role, held["codes"]) for role in ROLES)
