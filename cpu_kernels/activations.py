"""Activation buffers: what the matmul kernels read, and the operations that fill them from float32 rows.

Columns (tokens) lie in tiles of `isa.tile_columns`, a last, smaller tile rounded up to a power of two with columns of
zeros; a tile lies block by block of 32 values, its columns interleaved, so that a kernel reads one increasing stream:

- INT8: a block of N columns is 8 x N x 4 signed bytes (value = byte * scale), then N float32 scales, and N float32 each
  of the negated sums of a block's 32 bytes, of its first 16 and of its last 16: 48 N bytes.
- FLOAT32: a block is 32 x N float32.
- TABLES: a block of 64 values is four units of 16, a unit four tables a column, a table 16 bytes: the sums of 4 values
  with all choices of signs (bit i of the place set: value i is added, else subtracted), divided by the block's scale,
  plus 128. Then 16 N float32: half the scale, half the sums of the block, of its two halves and of its four quarters;
  the rest is unused and keeps tables on cache lines: 320 N bytes. The scale is the greatest sum of 4 magnitudes / 127
  (T-MAC, arXiv:2407.00088, with a scale for 64 values and no sums by rounding averages).

Every weight type is multiplied with the same int8 blocks. An int8 block's scale is the greatest magnitude / 127; blocks
below 1e-30 become zeros, NaN and infinities give NaN. Rows are padded with zeros to whole blocks. Knows nothing about
weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.compiler import kernel_address
from cpu_kernels.isa import ISA
from cpu_kernels.memory import aligned_bytes
from cpu_kernels.program import Field, Row
from cpu_kernels.simd import F32, I8, I32, Kernel, Value, vector_type

# (kernel, values, address of the tile's block, tile width, column)
_BlockWriter = Callable[[Kernel, list[Value], Value, Value, Value], None]

BLOCK = 32
INT8_BLOCK_BYTES = 48  # of one column
FLOAT_BLOCK_BYTES = 4 * BLOCK
TABLE_BLOCK = 64  # values
TABLE_UNIT_BYTES = 64  # tables of 16 values of one column
TABLE_NUMBERS = 16  # float32 of one column
TABLE_BLOCK_BYTES = TABLE_BLOCK // 16 * TABLE_UNIT_BYTES + 4 * TABLE_NUMBERS
_TINY = 1e-30


class ActivationKind(Enum):
    """What a buffer holds."""

    INT8 = BLOCK, INT8_BLOCK_BYTES
    FLOAT32 = BLOCK, FLOAT_BLOCK_BYTES
    TABLES = TABLE_BLOCK, TABLE_BLOCK_BYTES

    @property
    def block_columns(self) -> int:
        """Values of one block of one column."""
        return int(self.value[0])

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one column."""
        return int(self.value[1])

    def blocks(self, k: int) -> int:
        """Blocks of a row of `k` values."""
        return -(-k // self.block_columns)

    def row_bytes(self, k: int) -> int:
        """Bytes of one column of `k` values."""
        return self.blocks(k) * self.block_bytes


def padded_columns(n: int, isa: ISA) -> int:
    """Columns that a buffer for `n` has: whole tiles and a last one rounded up to a power of two."""
    full, rest = divmod(n, isa.tile_columns)
    return full * isa.tile_columns + (1 << (rest - 1).bit_length() if rest else 0)


@dataclass(frozen=True, slots=True)
class ActivationBuffer:
    """Memory for up to `capacity` columns of `k` values; a product of n columns uses the part for n."""

    kind: ActivationKind
    k: int
    capacity: int
    isa: ISA
    data: NDArray[np.uint8]

    @classmethod
    def allocate(cls, kind: ActivationKind, k: int, capacity: int, isa: ISA) -> "ActivationBuffer":
        """A zeroed buffer; ValueError for sizes below 1."""
        return cls(kind, k, capacity, isa, aligned_bytes(cls.num_bytes(kind, k, capacity, isa)))

    @staticmethod
    def num_bytes(kind: ActivationKind, k: int, capacity: int, isa: ISA) -> int:
        """Bytes that such a buffer takes; ValueError for sizes below 1."""
        if k < 1 or capacity < 1:
            raise ValueError(f"an activation buffer of {k} values x {capacity} columns")
        return padded_columns(capacity, isa) * kind.row_bytes(k)

    @property
    def address(self) -> int:
        """Of its first byte."""
        return int(self.data.ctypes.data)


def quantize_row(source: Field, stride_bytes: int, n: Field, buffer: ActivationBuffer) -> Row:
    """The operation that fills `buffer` from `n` rows of float32 at address `source`. Work items: blocks."""
    kind, blocks = buffer.kind, buffer.kind.blocks(buffer.k)
    name = f"quantize_{kind.name.lower()}"
    address = kernel_address(name, buffer.isa, partial(_trace_quantize, kind=kind))
    return Row(name, address, blocks, (source, stride_bytes, n, buffer.address, blocks, buffer.k), keep=(buffer,))


def _trace_quantize(kernel: Kernel, kind: ActivationKind) -> None:
    """Tiles that are full or of one column, the usual ones, have code of their own, in which places are constants.

    With it, and with sums and maxima that stay in vectors, 2048 values take 0.44 us instead of 0.98 (INT8, Zen 5).
    """
    n, out, row_blocks = kernel.arg(2), kernel.arg(3), kernel.arg(4)
    tile = kernel.isa.tile_columns
    with kernel.loop(0, n, tile) as first:
        left = n - first
        width = tile_width(kernel, left)
        base = out + first * row_blocks * kind.block_bytes
        for usual in (1, tile):
            with kernel.when(left.equals(1) if usual == 1 else left >= usual):
                _fill_tile(kernel, kind, base, first, kernel.int64(usual), left)
        with kernel.when((left > 1) & (left < tile)):
            _fill_tile(kernel, kind, base, first, width, left)


def _fill_tile(kernel: Kernel, kind: ActivationKind, base: Value, first: Value, width: Value, left: Value) -> None:
    """Fills the blocks [begin, end) of a tile at `base`, whose columns from `left` on only pad it."""
    source, stride, k = kernel.arg(0), kernel.arg(1), kernel.arg(5)
    size = kind.block_columns
    with kernel.loop(kernel.begin, kernel.end) as block, kernel.loop(0, width) as column:
        is_real = column < left
        row = source + kernel.select(is_real, first + column, kernel.int64(0)) * stride
        start = block * size
        there = kernel.select(is_real, kernel.minimum(k - start, kernel.int64(size)), kernel.int64(0))
        values = _load_block(kernel, row + start * 4, there, size)
        _WRITERS[kind](kernel, values, base + block * width * kind.block_bytes, width, column)


def tile_width(kernel: Kernel, left: Value) -> Value:
    """Columns of the tile that serves the next `left`: the full tile, or `left` rounded up to a power of two."""
    width = kernel.int64(kernel.isa.tile_columns)
    smaller = kernel.isa.tile_columns // 2
    while smaller:
        width = kernel.select(left <= smaller, kernel.int64(smaller), width)
        smaller //= 2
    return width


_HALF = vector_type(F32, 16)


def _load_block(kernel: Kernel, place: Value, there: Value, size: int) -> list[Value]:
    """The first `there` float32 at an address as vectors of 16, `size` values with the zeros after them."""
    origin, memory = kernel.variable(place), kernel.scratch(4 * size)
    with kernel.when(there < size):
        for part in range(size // 16):
            kernel.store(kernel.constant(_HALF, 0.0), memory + 64 * part)
        with kernel.loop(0, there) as index:
            kernel.store(kernel.load(F32, place + index * 4), memory + index * 4)
        origin.set(memory)
    return [kernel.load(_HALF, origin.get() + 64 * part) for part in range(size // 16)]


def _write_int8(kernel: Kernel, values: list[Value], base: Value, width: Value, column: Value) -> None:
    bits = [value.bitcast(vector_type(I32, 16)) & 0x7FFFFFFF for value in values]
    # As integers, the bit patterns of magnitudes are in order and NaN comes last.
    greatest = _greatest_in_all(kernel, kernel.maximum(*bits)).bitcast(vector_type(F32, 4))
    is_tiny = greatest < _TINY
    zero = kernel.constant(greatest.type, 0.0)
    scale = kernel.select(is_tiny, zero, greatest / 127.0).lane(0)
    inverse = kernel.select(is_tiny, zero, 127.0 / greatest).shuffle([0] * 16)
    codes = [kernel.round_to_int(value * inverse) for value in values]
    for half, code in enumerate(codes):
        groups = code.truncate(I8).bitcast(vector_type(I32, 4))
        for group in range(4):
            kernel.store(groups.lane(group), base + (width * (4 * half + group) + column) * 4)
    sums = _sums_of_both(*codes).to_float()
    first, last = sums.lane(0), sums.lane(1)
    for place, number in enumerate((scale, -(first + last), -first, -last)):
        kernel.store(number, base + width * (BLOCK + 4 * place) + column * 4)


def _greatest_in_all(kernel: Kernel, value: Value) -> Value:
    """The greatest of a vector's elements, four times: it stays in vector registers, which is faster."""
    while value.type.count > 4:
        half = value.type.count // 2
        value = kernel.maximum(value.shuffle(range(half)), value.shuffle(range(half, 2 * half)))
    for order in ((2, 3, 0, 1), (1, 0, 3, 2)):
        value = kernel.maximum(value, value.shuffle(order))
    return value


def _sums_of_both(left: Value, right: Value) -> Value:
    """The sums of two vectors of integers, as a vector of two."""
    count = left.type.count
    while count > 1:
        half = count // 2
        lows, highs = ([*range(at, at + half), *range(count + at, count + at + half)] for at in (0, half))
        both = left.shuffle(lows, right) + left.shuffle(highs, right)
        if half == 1:
            return both
        left, right, count = both.shuffle(range(half)), both.shuffle(range(half, count)), half
    return left


def _write_float(kernel: Kernel, values: list[Value], base: Value, width: Value, column: Value) -> None:
    for half, value in enumerate(values):
        for lane in range(16):
            kernel.store(value.lane(lane), base + (width * (16 * half + lane) + column) * 4)


def _write_tables(kernel: Kernel, values: list[Value], base: Value, width: Value, column: Value) -> None:
    bits = [_sums_of_four(value.bitcast(vector_type(I32, 16)) & 0x7FFFFFFF) for value in values]
    while len(bits) > 1:
        bits = [kernel.maximum(*pair) for pair in zip(bits[::2], bits[1::2], strict=True)]
    greatest = kernel.max_lanes(bits[0]).bitcast(F32)
    is_tiny = greatest < _TINY
    zero = kernel.constant(F32, 0.0)
    inverse = kernel.splat(kernel.select(is_tiny, zero, 127.0 / greatest), 16)
    for unit, value in enumerate(values):
        scaled = value * inverse
        place = base + (width * unit + column) * TABLE_UNIT_BYTES
        for table in range(4):
            kernel.store(_table(kernel, scaled, 4 * table), place + 16 * table)
    quarters = [kernel.sum_lanes(value) * 0.5 for value in values]
    halves = [quarters[0] + quarters[1], quarters[2] + quarters[3]]
    scale = kernel.select(is_tiny, zero, greatest / 254.0)
    place = base + width * (TABLE_BLOCK // 16 * TABLE_UNIT_BYTES) + column * 4
    for index, number in enumerate((scale, halves[0] + halves[1], *halves, *quarters)):
        kernel.store(number, place + width * (4 * index))


def _sums_of_four(bits: Value) -> Value:
    """Bits of 16 magnitudes to those of the sums of every four. As integers they are in order, NaN last."""
    sums = bits.bitcast(_HALF)
    for _ in range(2):
        count = sums.type.count
        sums = sums.shuffle(range(0, count, 2)) + sums.shuffle(range(1, count, 2))
    return sums.bitcast(vector_type(I32, 4)) & 0x7FFFFFFF


def _table(kernel: Kernel, values: Value, first: int) -> Value:
    """The 16 signed sums of four of the values, rounded, plus 128, as bytes."""
    total = values.shuffle([first] * 16) * _signs(kernel, 0)
    for index in range(1, 4):
        total = kernel.fma(values.shuffle([first + index] * 16), _signs(kernel, index), total)
    return (kernel.round_to_int(total) + 128).truncate(I8)


def _signs(kernel: Kernel, bit: int) -> Value:
    return kernel.table(F32, [1.0 if place >> bit & 1 else -1.0 for place in range(16)])


_WRITERS: Mapping[ActivationKind, _BlockWriter] = {
    ActivationKind.INT8: _write_int8,
    ActivationKind.FLOAT32: _write_float,
    ActivationKind.TABLES: _write_tables,
}
