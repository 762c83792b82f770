"""Activation buffers: what the matmul kernels read, and the operations that fill them from float32 rows.

Columns (tokens) lie in tiles of `isa.tile_columns`, a last, smaller tile rounded up to a power of two with columns of
zeros; a tile lies block by block of 32 values, its columns interleaved, so that a kernel reads one increasing stream:

- INT8: a block of N columns is 8 x N x 4 signed bytes (value = byte * scale), then N float32 scales, and N float32 each
  of the negated sums of a block's 32 bytes, of its first 16 and of its last 16: 48 N bytes.
- FLOAT32: a block is 32 x N float32.

Every weight type is multiplied with the same int8 blocks. A scale is the greatest magnitude / 127; blocks below 1e-30
become zeros, NaN and infinities give NaN. Rows are padded with zeros to whole blocks. Knows nothing about weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.compiler import kernel_address
from cpu_kernels.isa import ISA
from cpu_kernels.memory import aligned_bytes
from cpu_kernels.program import Field, Row
from cpu_kernels.simd import F32, I8, I32, Kernel, Value, vector_type

# (kernel, row address, block, whether the column is real, address of the tile's block, tile width, column)
_ColumnWriter = Callable[[Kernel, Value, Value, Value, Value, Value, Value], None]

BLOCK = 32
INT8_BLOCK_BYTES = 48  # of one column
FLOAT_BLOCK_BYTES = 4 * BLOCK
_TINY = 1e-30


class ActivationKind(Enum):
    """What a buffer holds."""

    INT8 = INT8_BLOCK_BYTES
    FLOAT32 = FLOAT_BLOCK_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one column."""
        return int(self.value)


def blocks_of(k: int) -> int:
    """Blocks of a row of `k` values."""
    return -(-k // BLOCK)


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
        return padded_columns(capacity, isa) * blocks_of(k) * kind.block_bytes

    @property
    def address(self) -> int:
        """Of its first byte."""
        return int(self.data.ctypes.data)


def quantize_row(source: Field, stride_bytes: int, n: Field, buffer: ActivationBuffer) -> Row:
    """The operation that fills `buffer` from `n` rows of float32 at address `source`. Work items: blocks of 32."""
    trace = _trace_int8 if buffer.kind is ActivationKind.INT8 else _trace_float
    name = f"quantize_{buffer.kind.name.lower()}"
    return Row(
        name,
        kernel_address(name, buffer.isa, trace),
        blocks_of(buffer.k),
        (source, stride_bytes, n, buffer.address, blocks_of(buffer.k), buffer.k),
        keep=(buffer,),
    )


def _for_each_column(kernel: Kernel, block_bytes: int, write: _ColumnWriter) -> None:
    """Runs over the columns of every block in [begin, end), those that only pad a tile included."""
    source, stride, n, out, blocks = (kernel.arg(index) for index in range(5))
    tile = kernel.isa.tile_columns
    with kernel.loop(kernel.begin, kernel.end) as block, kernel.loop(0, n, tile) as first:
        left = n - first
        width = tile_width(kernel, left)
        base = out + first * blocks * block_bytes + block * width * block_bytes
        with kernel.loop(0, width) as column:
            is_real = column < left
            row = kernel.select(is_real, first + column, kernel.int64(0))
            write(kernel, source + row * stride, block, is_real, base, width, column)


def tile_width(kernel: Kernel, left: Value) -> Value:
    """Columns of the tile that serves the next `left`: the full tile, or `left` rounded up to a power of two."""
    width = kernel.int64(kernel.isa.tile_columns)
    smaller = kernel.isa.tile_columns // 2
    while smaller:
        width = kernel.select(left <= smaller, kernel.int64(smaller), width)
        smaller //= 2
    return width


_HALF = vector_type(F32, 16)


def _load_half_blocks(kernel: Kernel, row: Value, block: Value, is_real: Value) -> list[Value]:
    """The 32 values as two vectors of 16, zeros where the row ends or the column only pads."""
    start = block * BLOCK
    whole = kernel.arg(5) - start >= BLOCK
    memory = kernel.scratch(4 * BLOCK)
    zero = kernel.constant(_HALF, 0.0)
    for half in range(2):
        kernel.store(zero, memory + 64 * half)
    end = kernel.select(whole, kernel.int64(0), kernel.arg(5) - start)
    with kernel.loop(0, kernel.select(is_real, end, kernel.int64(0))) as place:
        kernel.store(kernel.load(F32, row + (start + place) * 4), memory + place * 4)
    origin = kernel.select(is_real & whole, row + start * 4, memory)
    return [kernel.load(_HALF, origin + 64 * half) for half in range(2)]


def _write_int8(
    kernel: Kernel, row: Value, block: Value, is_real: Value, base: Value, width: Value, column: Value
) -> None:
    values = _load_half_blocks(kernel, row, block, is_real)
    bits = [value.bitcast(vector_type(I32, 16)) & 0x7FFFFFFF for value in values]
    # As integers, the bit patterns of magnitudes are in order and NaN comes last.
    greatest = kernel.max_lanes(kernel.maximum(*bits)).bitcast(F32)
    is_tiny = greatest < _TINY
    zero = kernel.constant(F32, 0.0)
    scale = kernel.select(is_tiny, zero, greatest / 127.0)
    inverse = kernel.splat(kernel.select(is_tiny, zero, 127.0 / greatest), 16)
    sums = []
    for half, value in enumerate(values):
        codes = kernel.round_to_int(value * inverse)
        sums.append(kernel.sum_lanes(codes).to_float())
        groups = codes.truncate(I8).bitcast(vector_type(I32, 4))
        for group in range(4):
            kernel.store(groups.lane(group), base + (width * (4 * half + group) + column) * 4)
    for place, number in enumerate((scale, -(sums[0] + sums[1]), -sums[0], -sums[1])):
        kernel.store(number, base + width * (BLOCK + 4 * place) + column * 4)


def _write_float(
    kernel: Kernel, row: Value, block: Value, is_real: Value, base: Value, width: Value, column: Value
) -> None:
    for half, value in enumerate(_load_half_blocks(kernel, row, block, is_real)):
        for lane in range(16):
            kernel.store(value.lane(lane), base + (width * (16 * half + lane) + column) * 4)


def _trace_int8(kernel: Kernel) -> None:
    _for_each_column(kernel, INT8_BLOCK_BYTES, _write_int8)


def _trace_float(kernel: Kernel) -> None:
    _for_each_column(kernel, FLOAT_BLOCK_BYTES, _write_float)
