"""What matmul kernels are made of: a `Layout` for each weight format, over a `Tile` of rows and columns.

A panel holds the rows of a matrix in groups of `isa.lanes`, one row a vector lane; a group is one increasing stream of
steps (a step is one quant block of every row). A tile of N columns is multiplied with a group in one pass, and each
column's sum takes the same operations in the same order whatever N is: column j of a product is bitwise equal to the
product of that column alone. An output is computed by one thread. Per block of 32 weights and column

    f += (sum over parts of scale * (dot - offset * sum) - minimum * sum) * activation scale

where dot is an exact integer sum, taken to float32 exactly. Knows nothing about the formats themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.activations import BLOCK, ActivationKind
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.quant_types import QuantType
from cpu_kernels.simd import F32, I16, Kernel, Value, vector_type

PREFETCH_BYTES = 6144  # ahead of the loads of weights; 4 to 8 KiB were equally good, none lost a third
_LINE = 64

Codes = Sequence[Callable[[], Value]]


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of a block that share a scale: code vectors (4 weights of every row each), unsigned or signed bytes.

    weight = scale * (code - offset); `is_signed` codes go through `Tile.signed`.
    """

    codes: Codes
    scale: Value
    offset: float = 0.0
    is_signed: bool = False


class Tile:
    """A row group times N columns while its kernel is built: where the panel is, where the activations are, N sums."""

    def __init__(self, kernel: Kernel, panel: Value, activations: Value, sums: Sequence[Value]) -> None:
        self.kernel = kernel
        self.columns = len(sums)
        self.panel = kernel.variable(panel)
        self.activations = kernel.variable(activations)
        self.sums = [kernel.variable(total) for total in sums]
        self.vector_bytes = kernel.isa.vector_bytes
        self._is_unrolled = False
        self._passed = 0
        self._lines: set[int] = set()

    def load(self, offset: int, kind: Any = None) -> Value:
        """A vector (bytes unless `kind` says otherwise) `offset` bytes into the panel; prefetches the stream ahead."""
        offset += self._passed
        address = self.panel.get() + offset
        if offset // _LINE not in self._lines:
            self._lines.add(offset // _LINE)
            self.kernel.prefetch(self.panel.get(), offset + PREFETCH_BYTES)
        return self.kernel.load(self.kernel.bytes if kind is None else kind, address)

    def load_half(self, offset: int) -> Value:
        """A float16 of every row as float32."""
        return self.kernel.half_to_float(self.load(offset, vector_type(I16, self.kernel.lanes)))

    def advance(self, num_bytes: int) -> None:
        """Moves the panel on."""
        self._passed += num_bytes
        if not self._is_unrolled:
            self._settle()

    @contextmanager
    def unrolled(self) -> Iterator[None]:
        """Several steps in a row that move the panel on only at their end, so that each line is prefetched once."""
        self._is_unrolled = True
        yield
        self._is_unrolled = False
        self._settle()

    def _settle(self) -> None:
        self.panel.add(self._passed)
        self._passed = 0
        self._lines.clear()

    def signed_table(self, values: Sequence[int]) -> tuple[Value, float]:
        """A table of 16 signed bytes as this ISA multiplies them, and the offset that its entries have got."""
        offset = 128 if self.kernel.isa.unsigned_bytes else 0
        return self.kernel.byte_table([value + offset for value in values]), float(offset)

    def block(self, parts: Sequence[Part], minima: Sequence[Value] = ()) -> None:
        """Adds the next 32 weights of every row: one part of eight vectors, or two of four; as many minima or none."""
        kernel = self.kernel
        base = self.activations.get()
        totals: list[Value] = []
        for index, part in enumerate(parts):
            sums_at = 36 if len(parts) == 1 else 40 + 4 * index
            dots = self._dots(part, base, index * BLOCK // len(parts))
            offset = 128.0 if part.is_signed and kernel.isa.unsigned_bytes else part.offset
            for column, dot in enumerate(dots):
                value = dot.to_float()
                if offset:
                    total = self._number(base, sums_at, column)
                    value = kernel.fma(kernel.constant(kernel.floats, offset), total, value)
                if index == 0:
                    totals.append(value * part.scale)
                else:
                    totals[column] = kernel.fma(value, part.scale, totals[column])
        for index, minimum in enumerate(minima):
            sums_at = 36 if len(minima) == 1 else 40 + 4 * index
            for column, value in enumerate(totals):
                totals[column] = kernel.fma(minimum, self._number(base, sums_at, column), value)
        for column, value in enumerate(totals):
            scale = self._number(base, 32, column)
            self.sums[column].set(kernel.fma(value, scale, self.sums[column].get()))
        self.activations.add(ActivationKind.INT8.block_bytes * self.columns)

    def _number(self, base: Value, place: int, column: int) -> Value:
        """A float32 of a column's block in every lane."""
        return self.kernel.load_splat(F32, base + (place * self.columns + 4 * column))

    def _dots(self, part: Part, base: Value, first: int) -> list[Value]:
        kernel = self.kernel
        flip = part.is_signed and kernel.isa.unsigned_bytes
        multiply = kernel.dot_signed if part.is_signed and not flip else kernel.dot
        dots = [kernel.constant(kernel.ints, 0)] * self.columns
        is_full = self.columns >= 8  # all registers are taken, and none is for early loads
        for index, code in enumerate(part.codes):
            if is_full:
                kernel.keep_order()
            weights = code() ^ -128 if flip else code()
            for column in range(self.columns):
                place = (first + 4 * index) * self.columns + 4 * column
                dots[column] = multiply(dots[column], weights, kernel.load_bytes4(base + place))
        if is_full:
            kernel.keep_order()
        return dots


class Layout(ABC):
    """How one quant type lies in a panel: its packer and its dot product, which must agree."""

    activation_kind = ActivationKind.INT8
    # Whether codes are written out as bytes before many columns are multiplied with them. At 64 columns that gave Q6_K
    # 261 instead of 231 Gmac/s, IQ2_XXS 300 instead of 252, and nothing where codes are nibbles or bytes (Zen 5).
    unpacks_first = False
    # Steps of a turn of the loop at one column; more than one only where `dot` has no loop of its own. Two gave Q4_0
    # and Q8_0 5% where bytes come from RAM, four lost as much (Zen 5).
    unrolled_steps = 1

    def __init__(self, quant_type: QuantType) -> None:
        self.quant_type = quant_type
        self.step_columns = quant_type.block_size
        self.step_row_bytes = quant_type.block_bytes

    def pack_table(self) -> NDArray[np.uint8] | None:
        """What `LanePacker.look_up` reads; it must live as long as the process."""
        return None

    @abstractmethod
    def pack(self, packer: LanePacker) -> None:
        """Writes one step of a panel from the rows' quant blocks."""

    @abstractmethod
    def dot(self, tile: Tile) -> None:
        """Adds one step to the tile's sums and moves the tile on."""
