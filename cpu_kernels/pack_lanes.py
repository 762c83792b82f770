"""Packing one row group: vectors whose lane r comes from row r of a GGUF matrix, written one behind the other.

Most panels are GGUF's own blocks with their 32-bit words transposed: word i of the blocks of all rows of a group, side
by side. Then a kernel decodes GGUF's bits lane by lane. Layouts that need other bits compute them on these vectors.
Knows nothing about the formats.
"""

from typing import Any

from cpu_kernels.simd import I8, I16, I32, I64, Kernel, Value, vector_type


class LanePacker:
    """Reads words of the quant blocks of a row group while a packer kernel is built, and writes panel bytes."""

    def __init__(self, kernel: Kernel, rows: list[Value], target: Value, columns: Value) -> None:
        self.kernel = kernel
        self._columns = kernel.variable(columns)
        self._rows = [kernel.variable(row) for row in rows]
        self._target = kernel.variable(target)
        self._places: Value | None = None  # memory through which lanes become addresses

    def read(self, offset: "int | Value", element: Any = I32) -> Value:
        """The number at byte `offset` of every row's block, a vector of `isa.lanes`."""
        result = self.kernel.constant(vector_type(element, self.kernel.lanes), 0)
        for lane, row in enumerate(self._rows):
            result = result.with_lane(lane, self.kernel.load(element, row.get() + offset))
        return result

    def look_up(self, places: Value) -> Value:
        """The words at byte `places`, lane by lane, of the layout's `pack_table`."""
        kernel = self.kernel
        base = kernel.arg(7)
        if self._places is None:
            self._places = kernel.scratch(kernel.isa.vector_bytes)
        kernel.store(places, self._places)
        result = kernel.constant(kernel.ints, 0)
        for lane in range(kernel.lanes):
            place = kernel.load(I32, self._places + 4 * lane).extend(I64, signed=False)
            result = result.with_lane(lane, kernel.load(I32, base + place))
        return result

    def splat_int(self, value: Value) -> Value:
        """An int64 as int32 in every lane."""
        return self.kernel.splat(value.truncate(I32))

    def write(self, value: Value) -> None:
        """Puts a vector behind what was written before."""
        self.kernel.store(value, self._target.get())
        elements = value.type.count
        self._target.add(elements * value.type.element.width // 8)

    def copy_words(self, offset: int, count: int) -> None:
        """`count` 32-bit words from byte `offset` of the blocks on."""
        with self.kernel.loop(0, count) as word:
            self.write(self.read(word * 4 + offset))

    def copy_halves(self, offset: int) -> None:
        """A 16-bit number of every block, as scales are."""
        self.write(self.read(offset, I16))

    def copy_bytes(self, offset: int) -> None:
        """A byte of every block."""
        self.write(self.read(offset, I8))

    def columns_left(self) -> Value:
        """Columns of the matrix from this step on."""
        return self._columns.get()

    def next_step(self, columns: int, num_bytes: int) -> None:
        """Goes on by a step of so many columns, and bytes of every row."""
        self._columns.add(-columns)
        for row in self._rows:
            row.add(num_bytes)
