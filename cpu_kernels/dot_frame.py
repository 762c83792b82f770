"""The frame of every matmul kernel: batches of columns, row groups, chunks of steps, tiles of columns.

Loops are ordered so that memory is read once, as increasing streams, and what is used again stays in a cache. None of
it changes a sum: sums wait in memory between chunks as the float32 they are. Knows nothing about the formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cpu_kernels.activations import BLOCK, tile_width
from cpu_kernels.dot import Layout, Part, Tile
from cpu_kernels.simd import F32, Kernel, Value

MAX_BATCH = 128  # columns
UNPACKED_BYTES = 16 << 10  # codes and scales of a chunk that is unpacked first: they stay in the first-level cache


@dataclass(frozen=True, slots=True)
class _Shape:
    """What all unpacked blocks of a layout have in common: vectors, offset and signedness of each part, minima."""

    parts: tuple[tuple[int, float, bool], ...]
    minima: int

    @property
    def vectors(self) -> int:
        """Vectors of an unpacked block."""
        return sum(count for count, _, _ in self.parts) + len(self.parts) + self.minima


class _Unpacker(Tile):
    """Writes blocks out instead of multiplying them: code vectors, scales, minima."""

    def __init__(self, kernel: Kernel, panel: Value, target: Value) -> None:
        super().__init__(kernel, panel, target, ())
        self.target = kernel.variable(target)
        self.shape: _Shape | None = None

    def block(self, parts: Sequence[Part], minima: Sequence[Value] = ()) -> None:
        """Writes one block of 32 weights."""
        shape = _Shape(tuple((len(part.codes), part.offset, part.is_signed) for part in parts), len(minima))
        assert self.shape in (None, shape), "blocks of one layout are alike"
        self.shape = shape
        target = self.target.get()
        codes = [code for part in parts for code in part.codes]
        numbers = [*(part.scale for part in parts), *minima]
        for index, code in enumerate(codes):
            self.kernel.keep_order()
            self.kernel.store(code(), target + index * self.vector_bytes)
        for index, number in enumerate(numbers):
            self.kernel.store(number, target + (len(codes) + index) * self.vector_bytes)
        self.target.add(shape.vectors * self.vector_bytes)


def unpacked_steps(layout: Layout, lanes: int) -> int:
    """Steps of a chunk that is unpacked first: a block has at most eight vectors of codes, two scales, two minima."""
    return max(1, UNPACKED_BYTES // (layout.step_columns // BLOCK * 12 * 4 * lanes))


def trace_matmul(kernel: Kernel, layout: Layout) -> None:
    """Writes the kernel of a layout. Arguments:

    0 panels, 1 bytes of a row group, 2 steps of a row, 3 rows, 4 activations, 5 columns n, 6 out (n rows of float32),
    7 bytes from one row of out to the next, 8 whether to add to what is in out, 9 columns that go through all row
    groups together (whole tiles, at most MAX_BATCH; as many as stay in the second-level cache), 10 steps that go
    through all columns of a batch together (as many as stay in the first-level cache; at most `unpacked_steps` where
    the layout unpacks first). Work items: row groups.
    """
    panels, group_bytes, steps, rows, activations, n, out, out_stride, adds, batch, chunk = (
        kernel.arg(index) for index in range(11)
    )
    tile, size = kernel.isa.tile_columns, kernel.isa.vector_bytes
    passes = _Passes(kernel, layout)
    block_bytes = layout.activation_kind.row_bytes(layout.step_columns)
    sums = kernel.scratch(MAX_BATCH * size)
    zero = kernel.constant(kernel.floats, 0.0)
    with kernel.loop(0, n, batch) as first, kernel.loop(kernel.begin, kernel.end) as group:
        live = kernel.minimum(batch, n - first)
        together = kernel.select(live <= tile, steps, chunk)  # nothing is used again by a single tile
        with kernel.loop(0, (live + (tile - 1)) & -tile) as column:
            kernel.store(zero, sums + column * size)
        with kernel.loop(0, steps, together) as step:
            panel = panels + group * group_bytes + step * (layout.step_row_bytes * kernel.lanes)
            count = kernel.minimum(together, steps - step)
            place = activations + (first * steps) * block_bytes
            done = passes.call_unpacked(
                live, panel, count, place + step * (tile * block_bytes), steps * block_bytes, sums
            )
            with kernel.loop(done, live, tile) as column:
                width = tile_width(kernel, live - column)
                tile_place = place + (column * steps + step * width) * block_bytes
                passes.call(width, panel, tile_place, count, sums + column * size)
        first_row = group * kernel.lanes
        with kernel.loop(0, live) as column:
            target = out + (first + column) * out_stride + first_row * 4
            _store_sums(kernel, sums + column * size, target, rows - first_row, adds)


class _Passes:
    """The functions that multiply some steps of one row group with one tile of columns, adding to sums in memory."""

    def __init__(self, kernel: Kernel, layout: Layout) -> None:
        self._kernel = kernel
        self._layout = layout
        self._tile = kernel.isa.tile_columns
        self._blocks = layout.step_columns // BLOCK
        widths = (1 << bit for bit in range(self._tile.bit_length()))
        self._direct = {width: self._trace_direct(width) for width in widths}
        if layout.unpacks_first:
            self._memory = kernel.scratch(unpacked_steps(layout, kernel.lanes) * self._blocks * 12 * 4 * kernel.lanes)
            self._unpack, self._shape = self._trace_unpack()
            self._unpacked = self._trace_unpacked(self._shape)

    def call(self, width: Value, panel: Value, activations: Value, steps: Value, sums: Value) -> None:
        """Multiplies a tile of `width` columns."""
        for candidate, function in self._direct.items():
            with self._kernel.when(width.equals(candidate)):
                self._kernel.call(function, panel, activations, steps, sums)

    def call_unpacked(
        self, live: Value, panel: Value, steps: Value, activations: Value, column_bytes: Value, sums: Value
    ) -> Value:
        """Multiplies whole tiles, if there are two or more and the layout unpacks first. Gives the columns done."""
        kernel = self._kernel
        if not self._layout.unpacks_first:
            return kernel.int64(0)
        whole = live & -self._tile
        whole = kernel.select(whole > self._tile, whole, kernel.int64(0))
        with kernel.when(whole > 0):
            kernel.call(self._unpack, panel, self._memory, steps)
            with kernel.loop(0, whole, self._tile) as column:
                place = activations + column * column_bytes
                totals = sums + column * kernel.isa.vector_bytes
                kernel.call(self._unpacked, self._memory, place, steps * self._blocks, totals)
        return whole

    def _trace_direct(self, columns: int) -> Any:
        with self._kernel.subroutine(f"{self._kernel.module.name}_{columns}", 4) as (function, arguments):
            panel, activations, steps, sums = arguments
            tile = self._start(panel, activations, sums, columns)
            done = self._kernel.int64(0)
            unrolled = self._layout.unrolled_steps if columns == 1 else 1
            if unrolled > 1:
                done = steps & -unrolled
                with self._kernel.loop(0, done, unrolled), tile.unrolled():
                    for _ in range(unrolled):
                        self._layout.dot(tile)
            with self._kernel.loop(done, steps):
                self._layout.dot(tile)
            self._finish(tile, sums)
        return function

    def _trace_unpack(self) -> tuple[Any, _Shape]:
        with self._kernel.subroutine(f"{self._kernel.module.name}_unpack", 3) as (function, arguments):
            panel, target, steps = arguments
            unpacker = _Unpacker(self._kernel, panel, target)
            with self._kernel.loop(0, steps):
                self._layout.dot(unpacker)
        assert unpacker.shape is not None
        return function, unpacker.shape

    def _trace_unpacked(self, shape: _Shape) -> Any:
        kernel, size = self._kernel, self._kernel.isa.vector_bytes
        with kernel.subroutine(f"{kernel.module.name}_unpacked", 4) as (function, arguments):
            memory, activations, blocks, sums = arguments
            tile = self._start(memory, activations, sums, self._tile)
            with kernel.loop(0, blocks):
                base = tile.panel.get()
                numbers = base + sum(count for count, _, _ in shape.parts) * size
                parts, vector = [], 0
                for index, (count, offset, is_signed) in enumerate(shape.parts):
                    places = [base + (vector + place) * size for place in range(count)]
                    codes = [partial(kernel.load, kernel.bytes, place) for place in places]
                    parts.append(Part(codes, kernel.load(kernel.floats, numbers + index * size), offset, is_signed))
                    vector += count
                minima = [
                    kernel.load(kernel.floats, numbers + (len(parts) + index) * size) for index in range(shape.minima)
                ]
                tile.block(parts, minima)
                tile.advance(shape.vectors * size)
            self._finish(tile, sums)
        return function

    def _start(self, panel: Value, activations: Value, sums: Value, columns: int) -> Tile:
        kernel, size = self._kernel, self._kernel.isa.vector_bytes
        start = [kernel.load(kernel.floats, sums + column * size) for column in range(columns)]
        return Tile(kernel, panel, activations, start)

    def _finish(self, tile: Tile, sums: Value) -> None:
        for column, total in enumerate(tile.sums):
            self._kernel.store(total.get(), sums + column * self._kernel.isa.vector_bytes)


def _store_sums(kernel: Kernel, sums: Value, address: Value, rows: Value, adds: Value) -> None:
    """Stores or adds a vector of which only the first `rows` lanes are rows of the matrix."""
    whole = rows >= kernel.lanes
    total = kernel.load(kernel.floats, sums)
    with kernel.when(whole & adds.equals(0)):
        kernel.store(total, address)
    with kernel.when(whole & (adds > 0)):
        kernel.store(kernel.load(kernel.floats, address) + total, address)
    with kernel.when(rows < kernel.lanes), kernel.loop(0, rows) as row:
        value = kernel.variable(kernel.load(F32, sums + row * 4))
        with kernel.when(adds > 0):
            value.set(kernel.load(F32, address + row * 4) + value.get())
        kernel.store(value.get(), address + row * 4)
