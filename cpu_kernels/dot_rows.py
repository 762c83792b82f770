"""One row of a matrix in panels as float32, for every layout whose codes are multiplied as integers.

The layout's own `dot` is traced over a tile that writes weights instead of multiplying them, so that no format needs
code of its own. Knows nothing about what rows are for.
"""

from collections.abc import Sequence

from cpu_kernels.dot import Layout, Part, Tile
from cpu_kernels.simd import F32, I8, I32, Kernel, Value, vector_type


def trace_row(kernel: Kernel, layout: Layout) -> None:
    """Writes the kernel of a layout. Arguments: 0 the row group's panel, 1 steps, 2 the row's lane, 3 out (float32)."""
    reader = _Reader(kernel, kernel.arg(0), kernel.arg(2), kernel.arg(3))
    with kernel.loop(0, kernel.arg(1)):
        layout.dot(reader)


class _Reader(Tile):
    """Writes the weights of one row."""

    def __init__(self, kernel: Kernel, panel: Value, lane: Value, out: Value) -> None:
        super().__init__(kernel, panel, out, ())
        self._out = kernel.variable(out)
        self._vector = kernel.scratch(self.vector_bytes)
        self._place = self._vector + lane * 4

    def block(self, parts: Sequence[Part], minima: Sequence[Value] = ()) -> None:
        """Writes 32 weights: scale * (code - offset) - minimum."""
        kernel, out = self.kernel, self._out.get()
        lows = [self._of_lane(minimum).bitcast(F32) for minimum in minima]
        index = 0
        for part in parts:
            scale = kernel.splat(self._of_lane(part.scale).bitcast(F32), 4)
            for code in part.codes:
                codes = self._of_lane(code()).bitcast(vector_type(I8, 4)).extend(I32, part.is_signed)
                weights = (codes.to_float() - part.offset) * scale
                if lows:
                    weights = weights - kernel.splat(lows[index * len(lows) // 8], 4)
                kernel.store(weights, out + 16 * index)
                index += 1
        self._out.add(128)

    def _of_lane(self, vector: Value) -> Value:
        """The row's 32 bits of a vector."""
        self.kernel.store(vector, self._vector)
        return self.kernel.load(I32, self._place)
