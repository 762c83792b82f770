"""How quant blocks of GGUF lie on a GPU: every field of a block in a plane of its own, so that threads read runs.

A plane holds the same bytes as the file, in the same order of rows, blocks and bytes within a field: codes of one row
follow each other without the scales between them. Knows nothing about files, tensors' names or how a block is decoded.
Layouts: GGML's `ggml-common.h`; the fields' names and what is in them are told by `dequantize`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

FIELD_BYTES = MappingProxyType({"uint8": 1, "int8": 1, "float16": 2, "int16": 2, "int32": 4, "float32": 4})


@dataclass(frozen=True, slots=True)
class Field:
    """A run of `count` numbers of one type in a quant block; `dtype` by torch's name."""

    name: str
    offset: int  # bytes from the block's start
    dtype: str
    count: int

    @property
    def num_bytes(self) -> int:
        """Of one block."""
        return FIELD_BYTES[self.dtype] * self.count


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """`block_size` weights lie in `block_bytes` bytes, which the fields cover without gap or overlap."""

    quant_type: str
    block_size: int
    block_bytes: int
    fields: tuple[Field, ...]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; ValueError if a block would be cut."""
        return self.blocks(columns) * self.block_bytes

    def blocks(self, columns: int) -> int:
        """Blocks of a row of `columns` weights; ValueError if one would be cut."""
        if columns < 1 or columns % self.block_size:
            raise ValueError(
                f"{columns} columns are not a multiple of the {self.block_size} weights of a {self.quant_type} block"
            )
        return columns // self.block_size


def layout(quant_type: str) -> BlockLayout:
    """The layout of the type that GGUF calls so; NotImplementedError if a GPU matrix cannot hold it."""
    if quant_type not in LAYOUTS:
        raise NotImplementedError(f"{quant_type} matrices on a GPU; possible are {', '.join(LAYOUTS)}")
    return LAYOUTS[quant_type]


def _block(quant_type: str, block_size: int, *fields: tuple[str, str, int]) -> BlockLayout:
    """Fields in the order of the file: (name, dtype, count)."""
    offset, placed = 0, []
    for name, dtype, count in fields:
        placed.append(Field(name, offset, dtype, count))
        offset += placed[-1].num_bytes
    return BlockLayout(quant_type, block_size, offset, tuple(placed))


_SCALE, _SHIFT = ("scale", "float16", 1), ("shift", "float16", 1)

LAYOUTS: Mapping[str, BlockLayout] = MappingProxyType(
    {
        entry.quant_type: entry
        for entry in (
            _block("F32", 1, ("codes", "float32", 1)),
            _block("F16", 1, ("codes", "float16", 1)),
            _block("BF16", 1, ("codes", "int16", 1)),
            _block("Q4_0", 32, _SCALE, ("codes", "uint8", 16)),
            _block("Q4_1", 32, _SCALE, _SHIFT, ("codes", "uint8", 16)),
            _block("Q5_0", 32, _SCALE, ("high", "uint8", 4), ("codes", "uint8", 16)),
            _block("Q5_1", 32, _SCALE, _SHIFT, ("high", "uint8", 4), ("codes", "uint8", 16)),
            _block("Q8_0", 32, _SCALE, ("codes", "int8", 32)),
            _block("Q2_K", 256, ("scales", "uint8", 16), ("codes", "uint8", 64), _SCALE, _SHIFT),
            _block("Q3_K", 256, ("high", "uint8", 32), ("codes", "uint8", 64), ("scales", "uint8", 12), _SCALE),
            _block("Q4_K", 256, _SCALE, _SHIFT, ("scales", "uint8", 12), ("codes", "uint8", 128)),
            _block(
                "Q5_K", 256, _SCALE, _SHIFT, ("scales", "uint8", 12), ("high", "uint8", 32), ("codes", "uint8", 128)
            ),
            _block("Q6_K", 256, ("codes", "uint8", 128), ("high", "uint8", 64), ("scales", "int8", 16), _SCALE),
            _block("IQ1_S", 256, _SCALE, ("codes", "uint8", 32), ("high", "int16", 8)),
            _block("IQ1_M", 256, ("codes", "uint8", 32), ("high", "uint8", 16), ("scales", "int16", 4)),
            _block("IQ2_XXS", 256, _SCALE, ("codes", "int32", 16)),
            _block("IQ2_XS", 256, _SCALE, ("codes", "int16", 32), ("scales", "uint8", 8)),
            _block(
                "IQ2_S",
                256,
                *(_SCALE, ("codes", "uint8", 32), ("signs", "uint8", 32)),
                *(("high", "uint8", 8), ("scales", "uint8", 8)),
            ),
            _block("IQ3_XXS", 256, _SCALE, ("codes", "uint8", 64), ("signs", "int32", 8)),
            _block(
                "IQ3_S",
                256,
                *(_SCALE, ("codes", "uint8", 64), ("high", "uint8", 8)),
                *(("signs", "uint8", 32), ("scales", "uint8", 4)),
            ),
            _block("IQ4_NL", 32, _SCALE, ("codes", "uint8", 16)),
            _block("IQ4_XS", 256, _SCALE, ("high", "int16", 1), ("scales", "uint8", 4), ("codes", "uint8", 128)),
            _block("TQ1_0", 256, ("codes", "uint8", 48), ("rest", "uint8", 4), _SCALE),
            _block("TQ2_0", 256, ("codes", "uint8", 64), _SCALE),
            _block("MXFP4", 32, ("scale", "uint8", 1), ("codes", "uint8", 16)),
            _block("NVFP4", 64, ("scales", "uint8", 4), ("codes", "uint8", 32)),
            _block("Q1_0", 128, _SCALE, ("codes", "uint8", 16)),
            _block("Q2_0", 64, _SCALE, ("codes", "uint8", 16)),
        )
    }
)
