"""Products by the kernels and by float64, on random quant blocks, for every test of the matmul kernels.

The reference knows the formats only through `cpu_kernels.reference.dequantize`; its activations are quantised by the
rule of `cpu_kernels.activations`, written again in numpy.
"""

import ctypes
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.activations import ActivationKind, quantize_row
from cpu_kernels.formats import PanelFormat, panel_format
from cpu_kernels.isa import ISA
from cpu_kernels.matmul import matmul_row
from cpu_kernels.pack import pack
from cpu_kernels.program import Row
from cpu_kernels.quant_types import QuantType, quant_type
from cpu_kernels.reference.dequantize import dequantize
from cpu_kernels.simd import MAX_ARGS
from cpu_kernels.tuning import Family

# Of sum |x| |w|. Kernels reach 1.5e-7; the sums' order and float32 scales are all that differs.
TOLERANCE = 4e-7
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"),
)
# Where the float16 numbers of a block lie; the default is its beginning.
_HALVES = {
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"Q4_1": (0, 2), "Q5_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,)},
}
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def random_blocks(
    kind: QuantType, rows: int, columns: int, rng: np.random.Generator, scale: float = 1.0
) -> NDArray[np.uint8]:
    """GGUF bytes of a matrix with random codes and finite scales of either sign up to `scale`."""
    if kind.block_size == 1:
        values = (rng.standard_normal(rows * columns) * scale).astype(np.float32)
        if kind.name == "BF16":
            return np.ascontiguousarray(values.view(np.uint16)[1::2]).view(np.uint8)
        return values.astype({"F32": np.float32, "F16": np.float16}[kind.name]).view(np.uint8)
    count = rows * columns // kind.block_size
    blocks = rng.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = rng.integers(100, 130, count)
    elif kind.name == "NVFP4":
        blocks[:, :4] = rng.integers(0, 0x7F, (count, 4))
    elif kind.name == "IQ1_M":  # d = 0x3A75, a nibble above each of four numbers
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | np.array([0x50, 0x70, 0xA0, 0x30], dtype=np.uint8)
    else:
        for place in _HALVES.get(kind.name, (0,)):
            halves = rng.uniform(-scale, scale, count).astype(np.float16)
            blocks[:, place : place + 2] = halves[:, None].view(np.uint8)
    return blocks.reshape(-1)


def run(row: Row, begin: int = 0, end: int | None = None) -> None:
    """Runs an operation's work items on this thread."""
    assert isinstance(row.function, int)
    args = np.zeros(MAX_ARGS, dtype=np.int64)
    args[: len(row.args)] = row.args  # type: ignore[assignment]
    _FUNCTION(row.function)(args.ctypes.data, begin, row.items if end is None else end)


@dataclass(frozen=True, slots=True)
class Case:
    """A packed matrix with its GGUF bytes."""

    form: PanelFormat
    rows: int
    columns: int
    data: NDArray[np.uint8]
    panels: NDArray[np.uint8]

    @classmethod
    def random(
        cls,
        name: str,
        isa: ISA,
        rows: int,
        columns: int,
        rng: np.random.Generator,
        scale: float = 1.0,
        family: Family = Family.DOT,
    ) -> "Case":
        """A matrix of random blocks."""
        kind = quant_type(name)
        data = random_blocks(kind, rows, columns, rng, scale)
        panels = pack(data, kind, rows, columns, isa, family=family)
        return cls(panel_format(kind, isa, family), rows, columns, data, panels)

    def multiply(self, x: NDArray[np.float32], slices: int = 1, out: NDArray[np.float32] | None = None) -> NDArray:
        """x (n, columns) times the matrix, by the kernels, row groups in so many runs; (n, rows), added to `out`."""
        n = len(x)
        buffer = self.form.activations(self.columns, n)
        run(quantize_row(x.ctypes.data, x.strides[0], n, buffer))
        result = np.full((n, self.rows + 3), np.nan, dtype=np.float32)
        if out is not None:
            result[:, : self.rows] = out
        row = matmul_row(
            self.form,
            self.panels.ctypes.data,
            self.rows,
            self.columns,
            buffer,
            result.ctypes.data,
            result.strides[0],
            n,
            adds=out is not None,
        )
        bounds = [row.items * part // slices for part in range(slices + 1)]
        for begin, end in pairwise(bounds):
            run(row, begin, end)
        assert np.isnan(result[:, self.rows :]).all(), "wrote beyond the rows"
        return result[:, : self.rows].copy()

    def error(self, x: NDArray[np.float32], result: NDArray[np.float32]) -> float:
        """The greatest error of a product against float64, relative to sum |x| |w|.

        Only int8 activations are rounded here: tables are compared with what their activations are.
        """
        weights = dequantize(self.data.reshape(self.rows, -1), self.form.quant_type).astype(np.float64)
        values = quantised(x) if self.form.activation_kind is ActivationKind.INT8 else x.astype(np.float64)
        magnitude = np.abs(values) @ np.abs(weights).T
        return float((np.abs(result - values @ weights.T) / np.maximum(magnitude, 1e-30)).max())


def quantised(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Activations as int8 blocks of 32 stand for them: byte * greatest magnitude / 127, (n, k) padded with zeros."""
    n, k = x.shape
    padded = np.zeros((n, -(-k // 32) * 32), dtype=np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(n, -1, 32)
    greatest = np.abs(blocks).max(axis=2, keepdims=True)
    inverse = np.float32(127) / np.where(greatest < 1e-30, np.float32(np.inf), greatest)
    scale = np.where(greatest < 1e-30, np.float32(0), greatest / np.float32(127))
    return (np.rint(blocks * inverse).astype(np.float64) * scale).reshape(n, -1)[:, :k]
