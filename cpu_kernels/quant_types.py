"""The number formats weights are stored in: name, GGML id, weights and bytes of one quant block.

Knows nothing about files, models or how a block is decoded. The figures are those of GGML's type table;
ids that GGML has withdrawn (Q4_2, Q4_3, the row-interleaved Q4_0 and IQ4_NL) are not listed and count as unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class QuantType:
    """One storage format; `block_size` weights lie in `block_bytes` bytes."""

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int

    @property
    def is_known(self) -> bool:
        """Whether the layout of its blocks is known; a file may name types that are newer than this table."""
        return self.block_size > 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included; 0 for an unknown type."""
        return 8 * self.block_bytes / self.block_size if self.is_known else 0.0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; ValueError if the type is unknown or a block would be cut."""
        if not self.is_known:
            raise ValueError(f"{self.name} has no known block layout")
        if columns % self.block_size:
            raise ValueError(
                f"{columns} columns are not a multiple of the {self.block_size} weights of a {self.name} block"
            )
        return columns // self.block_size * self.block_bytes


def unknown_quant_type(ggml_id: int) -> QuantType:
    """The stand-in for an id that `QUANT_TYPES` does not list."""
    return QuantType(name=f"type {ggml_id}", ggml_id=ggml_id, block_size=0, block_bytes=0)


_TABLE = (
    QuantType("F32", 0, 1, 4),
    QuantType("F16", 1, 1, 2),
    QuantType("Q4_0", 2, 32, 18),
    QuantType("Q4_1", 3, 32, 20),
    QuantType("Q5_0", 6, 32, 22),
    QuantType("Q5_1", 7, 32, 24),
    QuantType("Q8_0", 8, 32, 34),
    QuantType("Q8_1", 9, 32, 36),
    QuantType("Q2_K", 10, 256, 84),
    QuantType("Q3_K", 11, 256, 110),
    QuantType("Q4_K", 12, 256, 144),
    QuantType("Q5_K", 13, 256, 176),
    QuantType("Q6_K", 14, 256, 210),
    QuantType("Q8_K", 15, 256, 292),
    QuantType("IQ2_XXS", 16, 256, 66),
    QuantType("IQ2_XS", 17, 256, 74),
    QuantType("IQ3_XXS", 18, 256, 98),
    QuantType("IQ1_S", 19, 256, 50),
    QuantType("IQ4_NL", 20, 32, 18),
    QuantType("IQ3_S", 21, 256, 110),
    QuantType("IQ2_S", 22, 256, 82),
    QuantType("IQ4_XS", 23, 256, 136),
    QuantType("I8", 24, 1, 1),
    QuantType("I16", 25, 1, 2),
    QuantType("I32", 26, 1, 4),
    QuantType("I64", 27, 1, 8),
    QuantType("F64", 28, 1, 8),
    QuantType("IQ1_M", 29, 256, 56),
    QuantType("BF16", 30, 1, 2),
    QuantType("TQ1_0", 34, 256, 54),
    QuantType("TQ2_0", 35, 256, 66),
    QuantType("MXFP4", 39, 32, 17),
    QuantType("NVFP4", 40, 64, 36),
    QuantType("Q1_0", 41, 128, 18),
    QuantType("Q2_0", 42, 64, 18),
)

QUANT_TYPES: Mapping[int, QuantType] = MappingProxyType({entry.ggml_id: entry for entry in _TABLE})
_BY_NAME = {entry.name: entry for entry in _TABLE}


def quant_type(name: str) -> QuantType:
    """The type that GGUF calls `name`; KeyError if there is none."""
    return _BY_NAME[name]
