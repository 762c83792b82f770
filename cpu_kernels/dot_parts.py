"""Pieces that the layouts share: bit fields as code vectors, packed scales as float32. Knows no single format."""

from collections.abc import Callable, Sequence
from functools import partial

from cpu_kernels.dot import Codes, Tile
from cpu_kernels.simd import Value

BYTE_ONES = 0x01010101


def plane_codes(tile: Tile, offset: int, count: int, shift: int, mask: int) -> Codes:
    """`count` code vectors: a bit field of the vectors from `offset` on."""
    size, kernel = tile.vector_bytes, tile.kernel

    def code(index: int) -> Value:
        return kernel.byte_shift(tile.load(offset + index * size), shift, mask)

    return [partial(code, index) for index in range(count)]


def bit_codes(tile: Tile, offset: int, bits: Sequence[int], place: int) -> Codes:
    """For each of `bits`, that bit of every byte of the vector at `offset`, moved to bit `place`."""
    kernel = tile.kernel

    def code(bit: int) -> Value:
        return kernel.byte_shift(tile.load(offset), bit - place, 1 << place)

    return [partial(code, bit) for bit in bits]


def joined(low: Codes, high: Codes) -> Codes:
    """Codes whose bits come from two places."""

    def both(first: Callable[[], Value], second: Callable[[], Value]) -> Value:
        return first() | second()

    return [partial(both, *pair) for pair in zip(low, high, strict=True)]


def byte_lanes(packed: Sequence[Value], signed: bool = False) -> list[Value]:
    """The bytes of vectors of 32-bit lanes, byte 0 of the first vector first, as vectors of int32."""
    result = []
    for value in packed:
        word = value.bitcast(value.kernel.ints)
        for byte in range(4):
            if signed:
                result.append((word << 24 - 8 * byte).sar(24))
            else:
                result.append((word >> 8 * byte) & 255 if byte < 3 else word >> 24)
    return result


def store_scales(tile: Tile, numbers: Sequence[Value], factor: Value) -> Value:
    """Puts number * factor, float32, into memory of the kernel's own; gives the address of the first vector."""
    base = tile.kernel.scratch(len(numbers) * tile.vector_bytes)
    for index, number in enumerate(numbers):
        tile.kernel.store(number.to_float() * factor, base + index * tile.vector_bytes)
    return base


def spread_bits(bits: Value) -> Value:
    """Four bits at the bottom of 32-bit lanes, one to each byte."""
    return (bits * 0x00204081) & BYTE_ONES


def bits_to_planes(word: Value) -> Value:
    """Bit 4 i + m of 32-bit lanes to bit i of byte m: then bit i of every byte belongs to code vector i."""
    planes = spread_bits(word & 15)
    for index in range(1, 8):
        planes = planes | spread_bits((word >> 4 * index) & 15) << index
    return planes
