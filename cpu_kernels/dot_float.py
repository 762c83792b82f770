"""F32, F16 and BF16 weights: float32 products and sums. A step is 32 columns, each a vector of one weight a row.

Every column's sum runs in two chains (even and odd columns of the matrix), added at the end of each step, whatever the
number of activation columns is; one chain alone would wait for its own additions.
"""

from typing import Any

from cpu_kernels.activations import BLOCK, ActivationKind
from cpu_kernels.dot import Layout, Tile
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.quant_types import QuantType
from cpu_kernels.simd import F32, I16, I32, Value, vector_type


class FloatWeights(Layout):
    """A step: 32 vectors; columns past the last of the matrix are zeros."""

    activation_kind = ActivationKind.FLOAT32

    def __init__(self, quant_type: QuantType) -> None:
        super().__init__(quant_type)
        self.step_columns = BLOCK
        self.step_row_bytes = BLOCK * quant_type.block_bytes
        self._element: Any = I32 if quant_type.block_bytes == 4 else I16

    def pack(self, packer: LanePacker) -> None:
        """One weight after another."""
        kernel = packer.kernel
        left = packer.columns_left()
        with kernel.loop(0, kernel.minimum(left, kernel.int64(BLOCK))) as column:
            packer.write(packer.read(column * self.quant_type.block_bytes, self._element))
        with kernel.loop(left, BLOCK):
            packer.write(kernel.constant(vector_type(self._element, kernel.lanes), 0))

    def dot(self, tile: Tile) -> None:
        """Four columns of the matrix a turn."""
        kernel = tile.kernel
        vector = tile.vector_bytes * self.quant_type.block_bytes // 4
        chains = [[kernel.variable(kernel.constant(kernel.floats, 0.0)) for _ in tile.sums] for _ in range(2)]
        with kernel.loop(0, BLOCK // 4):
            base = tile.activations.get()
            for place in range(4):
                weights = self._load(tile, place * vector)
                for column, total in enumerate(chains[place % 2]):
                    value = kernel.load_splat(F32, base + 4 * (place * tile.columns + column))
                    total.set(kernel.fma(weights, value, total.get()))
            tile.activations.add(16 * tile.columns)
            tile.advance(4 * vector)
        for column, total in enumerate(tile.sums):
            total.set(total.get() + (chains[0][column].get() + chains[1][column].get()))

    def _load(self, tile: Tile, offset: int) -> Value:
        kernel = tile.kernel
        match self.quant_type.name:
            case "F32":
                return tile.load(offset, kernel.floats)
            case "F16":
                return tile.load_half(offset)
            case _:  # BF16: the upper half of a float32
                bits = tile.load(offset, vector_type(I16, kernel.lanes)).extend(I32, signed=False)
                return (bits << 16).bitcast(kernel.floats)
