"""Pieces of the table kernels: bit planes into panels, and sums of table entries out of them. Knows no single format.

A plane word of a row holds one bit of 32 consecutive weights: byte m has the bits of weights 4 m to 4 m + 3 in its low
nibble and those of weights 16 + 4 m on in its high one. So a nibble is the place in the table of four activations.

Where a lookup reaches 64 bytes (AVX512 VBMI), a vector holds the plane words of 16 rows; the four bytes of a lane look
up four tables and a dot product adds them. Elsewhere all lanes of a lookup share one table of 16 bytes: a vector holds
one byte of as many rows as it has bytes, byte 2 i that of row i and byte 2 i + 1 that of row i + half of them, and
entries are added as 16-bit numbers, even and odd bytes apart. Entries are unsigned, 128 more than what they stand for.
Both ways sum up integers exactly: 16 entries of 4 planes are at most 16 * 15 * 255, less than 2^16.
"""

from collections.abc import Sequence

from cpu_kernels.activations import TABLE_UNIT_BYTES
from cpu_kernels.dot import Tile
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.simd import F32, I8, I16, I32, Value, vector_type

_BIAS = 128
_TABLE_BYTES = 16
_WIDE_ROWS, _WIDE_BYTES = 16, 64  # of a vector whose lookups reach 64 bytes
UNITS = 4  # of 16 weights, in a block of activation tables
_LOW_BITS = 0x01010101


def plane_word(halves: Sequence[Sequence[Value]], bit: int) -> Value:
    """A plane of 32 weights: bit `bit` of every byte of four words with 16 weights, then of four with the next 16."""
    word: Value | None = None
    for index in range(4):
        low, high = ((half[index] >> bit) & _LOW_BITS for half in halves)
        pair = low | high << 4
        folded = (pair | pair >> 7 | pair >> 14 | pair >> 21) & 255
        word = folded if word is None else word | folded << 8 * index
    assert word is not None
    return word


def spread_nibbles(bits: Value) -> Value:
    """The four nibbles of the low half of 32-bit lanes, one to each byte's low nibble."""
    value = bits & 0xFFFF
    value = (value | value << 8) & 0x00FF00FF
    return (value | value << 4) & 0x0F0F0F0F


def write_plane(packer: LanePacker, word: Value) -> None:
    """Puts a plane word of every row into the panel."""
    kernel = packer.kernel
    if kernel.isa.has_wide_lookup:
        packer.write(word)
        return
    half = kernel.lanes // 2
    order = [row // 2 + row % 2 * half for row in range(kernel.lanes)]
    for byte in range(4):
        packer.write((word >> 8 * byte).truncate(I8).shuffle(order))


def table_sums(tile: Tile, offset: int, factors: Sequence[int], units: Sequence[int]) -> list[Value]:
    """For each column the sum over planes of factor times the table entries of units of 16 weights, exact, as float32.

    The units are of the present block. Planes lie at `offset`, each of as many words as there are halves of 32 weights
    in the units; a plane's factor is the next one's double or equal to it.
    """
    sums = _wide_sums if tile.kernel.isa.has_wide_lookup else _narrow_sums
    return sums(tile, offset, factors, units)


def _plane_offsets(tile: Tile, offset: int, planes: int, units: Sequence[int]) -> list[list[tuple[int, list[int]]]]:
    """For each plane where its words lie and which units they serve."""
    halves = sorted({unit // 2 for unit in units})
    result = []
    for _ in range(planes):
        words = []
        for half in halves:
            words.append((offset, [unit for unit in units if unit // 2 == half]))
            offset += tile.vector_bytes
        result.append(words)
    return result


def _bias(factors: Sequence[int], units: Sequence[int]) -> int:
    return _BIAS * 4 * len(units) * sum(factors)


def _wide_sums(tile: Tile, offset: int, factors: Sequence[int], units: Sequence[int]) -> list[Value]:
    kernel, columns = tile.kernel, tile.columns
    base = tile.activations.get()
    parts = range(kernel.lanes // _WIDE_ROWS)
    bytes_ = vector_type(I8, _WIDE_BYTES)
    table_of_byte = kernel.table(I8, [_TABLE_BYTES * byte for byte in range(4)] * _WIDE_ROWS)

    def table(unit: int, column: int) -> Value:
        return kernel.load(bytes_, base + (unit * columns + column) * TABLE_UNIT_BYTES)

    kept = {unit: table(unit, 0) for unit in units} if columns == 1 else {}
    start = kernel.constant(vector_type(I32, _WIDE_ROWS), -_bias(factors, units))
    dots = [[start] * len(parts) for _ in range(columns)]
    for index, words in enumerate(_plane_offsets(tile, offset, len(factors), units)):
        factor = kernel.constant(bytes_, factors[index])
        for place, served in words:
            packed = [tile.load(place + part * _WIDE_BYTES, bytes_) for part in parts]
            for unit in served:
                entries = [kernel.byte_shift(word, unit % 2 * 4, 15) | table_of_byte for word in packed]
                for column in range(columns):
                    values = kept[unit] if kept else table(unit, column)
                    for part in parts:
                        found = kernel.look_up_wide(values, entries[part])
                        dots[column][part] = kernel.dot(dots[column][part], found, factor)
    return [_joined([dot.to_float() for dot in column]) for column in dots]


def _joined(parts: Sequence[Value]) -> Value:
    """Vectors side by side as one."""
    result = parts[0]
    for part in parts[1:]:
        result = result.shuffle(range(2 * part.type.count), part)
    return result


def _narrow_sums(tile: Tile, offset: int, factors: Sequence[int], units: Sequence[int]) -> list[Value]:
    kernel, columns, rows = tile.kernel, tile.columns, tile.kernel.lanes
    base = tile.activations.get()
    bytes_, words_ = vector_type(I8, rows), vector_type(I16, rows // 2)
    zero = kernel.constant(words_, 0)
    both, odd = [zero] * columns, [zero] * columns  # both: even + 256 * odd, modulo 2^16
    for index, words in enumerate(_plane_offsets(tile, offset, len(factors), units)):
        if index and factors[index - 1] != factors[index]:
            both, odd = [total << 1 for total in both], [total << 1 for total in odd]
        for place, served in words:
            for byte in range(4):
                packed = tile.load(place + byte * rows, bytes_)
                for unit in served:
                    entry = kernel.byte_shift(packed, unit % 2 * 4, 15)
                    for column in range(columns):
                        start = base + ((unit * columns + column) * TABLE_UNIT_BYTES + byte * _TABLE_BYTES)
                        table = kernel.load(vector_type(I8, _TABLE_BYTES), start)
                        found = kernel.look_up(table.shuffle(list(range(_TABLE_BYTES)) * (rows // _TABLE_BYTES)), entry)
                        both[column] = both[column] + found.bitcast(words_)
                        odd[column] = odd[column] + (found.bitcast(words_) >> 8)
    bias = _bias(factors, units)
    result = []
    for column in range(columns):
        even = both[column] - (odd[column] << 8) - bias
        parts = [part.extend(I32, signed=True).to_float() for part in (even, odd[column] - bias)]
        result.append(_joined(parts))
    return result


class Number:
    """Places of the float32 of a column behind a block's tables."""

    HALF_SCALE = 0
    HALF_SUM = 1
    HALF_SUMS_OF_32 = 2
    HALF_SUMS_OF_16 = 4


def number(tile: Tile, place: int, column: int) -> Value:
    """A float32 of a column's present block in every lane."""
    start = UNITS * TABLE_UNIT_BYTES * tile.columns + 4 * (place * tile.columns + column)
    return tile.kernel.load_splat(F32, tile.activations.get() + start)
