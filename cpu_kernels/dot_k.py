"""K-quants with minima: Q4_K, Q5_K, Q2_K. 256 weights a block in runs of 32 (16 for Q2_K) with 6-bit (4-bit) scales.

weight = d * scale * code - dmin * minimum. A step: the words of packed scales, d, dmin, then codes in the order they
are used. A kernel first unpacks the scales of a step into memory of its own, as float32, then loops over the runs; a
product d * scale has at most 17 bits and is exact. Layouts of blocks: GGML's `ggml-common.h`.
"""

from cpu_kernels.dot import Layout, Part, Tile
from cpu_kernels.dot_parts import bit_codes, byte_lanes, joined, plane_codes, store_scales
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.simd import Value


def six_bit_scales(tile: Tile) -> tuple[Value, Value]:
    """Unpacks the three words at the head of a step of Q4_K or Q5_K; gives where 8 scales and 8 minima now lie.

    The first four of each fill the low 6 bits of words 0 and 1; the last four have their low nibbles in word 2 and two
    high bits above those of the first four.
    """
    kernel, size = tile.kernel, tile.vector_bytes
    first, second, third = (tile.load(size * word) for word in range(3))
    d, dmin = tile.load_half(3 * size), tile.load_half(3 * size + size // 2)
    scales = [first & 63, (third & 15) | kernel.byte_shift(first, 2, 48)]
    minima = [second & 63, kernel.byte_shift(third, 4, 15) | kernel.byte_shift(second, 2, 48)]
    return store_scales(tile, byte_lanes(scales), d), store_scales(tile, byte_lanes(minima), dmin)


def two_bit_scales(tile: Tile) -> tuple[Value, Value]:
    """Unpacks the head of a step of Q2_K and moves past it; gives where 16 scales and 16 minima now lie."""
    kernel, size = tile.kernel, tile.vector_bytes
    packed = [tile.load(size * word) for word in range(4)]
    d, dmin = tile.load_half(4 * size), tile.load_half(4 * size + size // 2)
    scales = store_scales(tile, byte_lanes([word & 15 for word in packed]), d)
    minima = store_scales(tile, byte_lanes([kernel.byte_shift(word, 4, 15) for word in packed]), dmin)
    tile.advance(5 * size)
    return scales, minima


class FourBitK(Layout):
    """Q4_K: four groups of eight words whose low nibbles are one run of 32 and whose high nibbles are the next."""

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """d, dmin, 12 bytes of scales, 128 of codes."""
        packer.copy_words(4, 3)
        packer.copy_halves(0)
        packer.copy_halves(2)
        packer.copy_words(16, 32)

    def dot(self, tile: Tile) -> None:
        """Two runs a turn."""
        kernel, size = tile.kernel, tile.vector_bytes
        scales, minima = six_bit_scales(tile)
        tile.advance(4 * size)
        with kernel.loop(0, 4) as turn:
            for high in range(2):
                place = (turn * 2 + high) * size
                scale, minimum = (kernel.load(kernel.floats, base + place) for base in (scales, minima))
                tile.block([Part(plane_codes(tile, 0, 8, 4 * high, 15), scale)], [minimum])
            tile.advance(8 * size)


class FiveBitK(Layout):
    """Q5_K: as Q4_K, with two words of fifth bits before each group of eight words.

    Bit 2 * (v % 4) + h of word v // 4 belongs to code vector v of run h.
    """

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """d, dmin, 12 bytes of scales, 32 of fifth bits (bit g for run g), 128 of codes."""
        packer.copy_words(4, 3)
        packer.copy_halves(0)
        packer.copy_halves(2)
        for turn in range(4):
            for word in range(2):
                bits = [(packer.read(16 + 4 * (4 * word + part)) >> 2 * turn) & 0x03030303 for part in range(4)]
                packer.write(bits[0] | bits[1] << 2 | bits[2] << 4 | bits[3] << 6)
            packer.copy_words(48 + 32 * turn, 8)

    def dot(self, tile: Tile) -> None:
        """Two runs a turn."""
        kernel, size = tile.kernel, tile.vector_bytes
        scales, minima = six_bit_scales(tile)
        tile.advance(4 * size)
        with kernel.loop(0, 4) as turn:
            for high in range(2):
                place = (turn * 2 + high) * size
                scale, minimum = (kernel.load(kernel.floats, base + place) for base in (scales, minima))
                fifth = [
                    *bit_codes(tile, 0, [2 * v + high for v in range(4)], 4),
                    *bit_codes(tile, size, [2 * v + high for v in range(4)], 4),
                ]
                codes = joined(plane_codes(tile, 2 * size, 8, 4 * high, 15), fifth)
                tile.block([Part(codes, scale)], [minimum])
            tile.advance(10 * size)


class TwoBitK(Layout):
    """Q2_K: two groups of eight words with four planes of 2 bits, each plane a run of two scales."""

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """16 bytes of scale (low nibble) and minimum (high), 64 of codes, d, dmin."""
        packer.copy_words(0, 4)
        packer.copy_halves(80)
        packer.copy_halves(82)
        packer.copy_words(16, 16)

    def dot(self, tile: Tile) -> None:
        """Four runs a turn."""
        kernel, size = tile.kernel, tile.vector_bytes
        scales, minima = two_bit_scales(tile)
        with kernel.loop(0, 2) as turn:
            for plane in range(4):
                place = (turn * 8 + 2 * plane) * size
                scale, minimum = (
                    [kernel.load(kernel.floats, base + place + size * half) for half in range(2)]
                    for base in (scales, minima)
                )
                codes = plane_codes(tile, 0, 8, 2 * plane, 3)
                tile.block([Part(codes[:4], scale[0]), Part(codes[4:], scale[1])], minimum)
            tile.advance(8 * size)
