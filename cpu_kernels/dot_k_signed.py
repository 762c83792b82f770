"""K-quants whose codes have an offset and no minima: Q6_K, Q3_K, and IQ4_XS, whose codes are entries of a table.

weight = d * scale * (code - offset); 256 weights a block, runs of 16 (IQ4_XS: 32). A step: the words of packed scales,
d, then codes in the order they are used; scales are unpacked first, exact, as in `dot_k`. Layouts of blocks: GGML's
`ggml-common.h`.
"""

from cpu_kernels.dot import Layout, Part, Tile
from cpu_kernels.dot_4bit import IQ4_VALUES, nibble_codes, table_codes
from cpu_kernels.dot_parts import bit_codes, byte_lanes, joined, plane_codes, store_scales
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.simd import I16, I32, Value, vector_type


def _two_scales(tile: Tile, scales: Value, place: Value) -> list[Value]:
    size = tile.vector_bytes
    return [tile.kernel.load(tile.kernel.floats, scales + place * size + size * half) for half in range(2)]


def three_bit_scales(tile: Tile) -> Value:
    """Unpacks the head of a step of Q3_K and moves past it; gives where 16 scales now lie."""
    kernel, size = tile.kernel, tile.vector_bytes
    first, second, third = (tile.load(size * word) for word in range(3))
    packed = [
        (first & 15) | kernel.byte_shift(third, -4, 48),
        (second & 15) | kernel.byte_shift(third, -2, 48),
        kernel.byte_shift(first, 4, 15) | (third & 48),
        kernel.byte_shift(second, 4, 15) | kernel.byte_shift(third, 2, 48),
    ]
    numbers = [number - 32 for number in byte_lanes(packed)]
    scales = store_scales(tile, numbers, tile.load_half(3 * size))
    tile.advance(3 * size + size // 2)
    return scales


class SixBitK(Layout):
    """Q6_K: for each half 16 words of nibbles and 8 words of 2-bit rests, a run of 32 in each of their four planes."""

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d."""
        packer.copy_words(192, 4)
        packer.copy_halves(208)
        for half in range(2):
            packer.copy_words(64 * half, 16)
            packer.copy_words(128 + 32 * half, 8)

    def dot(self, tile: Tile) -> None:
        """Four runs of 32 a turn."""
        kernel, size = tile.kernel, tile.vector_bytes
        packed = [tile.load(size * word) for word in range(4)]
        scales = store_scales(tile, byte_lanes(packed, signed=True), tile.load_half(4 * size))
        tile.advance(4 * size + size // 2)
        with kernel.loop(0, 2) as turn:
            for run in range(4):
                scale = _two_scales(tile, scales, turn * 8 + 2 * run)
                low = plane_codes(tile, (run % 2) * 8 * size, 8, 4 * (run // 2), 15)
                high = plane_codes(tile, 16 * size, 8, 2 * run - 4, 48)
                codes = joined(low, high)
                tile.block([Part(codes[:4], scale[0], 32.0), Part(codes[4:], scale[1], 32.0)])
            tile.advance(24 * size)


class ThreeBitK(Layout):
    """Q3_K: for each half four words of third bits and eight words with four planes of 2 bits.

    Bit 4 * (v // 4) + p of third-bit word v % 4 belongs to code vector v of plane p.
    """

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """32 bytes of high bits (bit g for run g of 32), 64 of low codes, 12 of scales, d."""
        packer.copy_words(96, 3)
        packer.copy_halves(108)
        for half in range(2):
            for word in range(4):
                low, high = ((packer.read(4 * part) >> 4 * half) & 0x0F0F0F0F for part in (word, word + 4))
                packer.write(low | high << 4)
            packer.copy_words(32 + 32 * half, 8)

    def dot(self, tile: Tile) -> None:
        """Four runs of 32 a turn."""
        kernel, size = tile.kernel, tile.vector_bytes
        scales = three_bit_scales(tile)
        with kernel.loop(0, 2) as turn:
            for plane in range(4):
                scale = _two_scales(tile, scales, turn * 8 + 2 * plane)
                low = plane_codes(tile, 4 * size, 8, 2 * plane, 3)
                third_bits = [bit_codes(tile, (v % 4) * size, [4 * (v // 4) + plane], 2)[0] for v in range(8)]
                codes = joined(low, third_bits)
                tile.block([Part(codes[:4], scale[0], 4.0), Part(codes[4:], scale[1], 4.0)])
            tile.advance(12 * size)


class TableNibblesK(Layout):
    """IQ4_XS: the values of IQ4_NL; eight groups of four words with a run of 32 in low and high nibbles."""

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """d, 16 bits of the scales' two high bits, 4 bytes of their low nibbles, 128 of codes."""
        packer.copy_words(4, 1)
        packer.copy_halves(2)
        packer.copy_halves(0)
        packer.copy_words(8, 32)

    def dot(self, tile: Tile) -> None:
        """One run of 32 a turn."""
        kernel, size = tile.kernel, tile.vector_bytes
        low = tile.load(0, kernel.ints)
        high = tile.load(size, vector_type(I16, kernel.lanes)).extend(I32, signed=False)
        numbers = [((low >> 4 * run & 15) | (high >> 2 * run & 3) << 4) - 32 for run in range(8)]
        scales = store_scales(tile, numbers, tile.load_half(size + size // 2))
        table, offset = tile.signed_table(IQ4_VALUES)
        tile.advance(2 * size)
        with kernel.loop(0, 8) as run:
            codes = table_codes(tile, nibble_codes(tile, 0), table)
            scale = kernel.load(kernel.floats, scales + run * size)
            tile.block([Part(codes, scale, offset, is_signed=not kernel.isa.unsigned_bytes)])
            tile.advance(4 * size)
