"""One and two bits: TQ2_0, Q2_0, Q1_0. Layouts of blocks: GGML's `ggml-common.h`."""

from cpu_kernels.dot import Layout, Part, Tile
from cpu_kernels.dot_parts import bit_codes, bits_to_planes, plane_codes
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.simd import Value


class TernaryPlanes(Layout):
    """TQ2_0: weight = d * (code - 1). A step: d, two groups of eight words with four planes of 2 bits."""

    def pack(self, packer: LanePacker) -> None:
        """64 bytes of codes, d."""
        packer.copy_halves(64)
        packer.copy_words(0, 16)

    def dot(self, tile: Tile) -> None:
        """Four runs of 32 a turn."""
        kernel, size = tile.kernel, tile.vector_bytes
        scale = tile.load_half(0)
        tile.advance(size // 2)
        with kernel.loop(0, 2):
            for plane in range(4):
                tile.block([Part(plane_codes(tile, 0, 8, 2 * plane, 3), scale, offset=1.0)])
            tile.advance(8 * size)


def _spread_pairs(byte: Value) -> Value:
    """Four fields of two bits at the bottom of 32-bit lanes, one to each byte."""
    return byte & 3 | (byte & 12) << 6 | (byte & 48) << 12 | (byte & 192) << 18


class TwoBit(Layout):
    """Q2_0: weight = d * (code - 1), 64 weights a block. A step: four words with four planes of 2 bits, scales."""

    def pack(self, packer: LanePacker) -> None:
        """d, 16 bytes, each with four consecutive weights."""
        for word in range(4):
            packed = packer.read(2 + 4 * word)
            planes = [_spread_pairs(packed >> 8 * plane & 255) << 2 * plane for plane in range(4)]
            packer.write(planes[0] | planes[1] | planes[2] | planes[3])
        packer.copy_halves(0)

    def dot(self, tile: Tile) -> None:
        """Vector 4 w + p of a block is plane p of word w."""
        size = tile.vector_bytes
        scale = tile.load_half(4 * size)
        for block in range(2):
            codes = [
                code
                for word in range(2)
                for plane in range(4)
                for code in plane_codes(tile, (2 * block + word) * size, 1, 2 * plane, 3)
            ]
            tile.block([Part(codes, scale, offset=1.0)])
        tile.advance(4 * size + size // 2)


class OneBit(Layout):
    """Q1_0: weight = +d or -d = 2 d * (bit - 1/2), 128 weights a block. A step: four words of bit planes, scales."""

    def pack(self, packer: LanePacker) -> None:
        """d, 16 bytes with a bit a weight."""
        for word in range(4):
            packer.write(bits_to_planes(packer.read(2 + 4 * word)))
        packer.copy_halves(0)

    def dot(self, tile: Tile) -> None:
        """Vector v of a block is bit v of its word's bytes."""
        size = tile.vector_bytes
        scale = tile.load_half(4 * size) * 2.0
        for word in range(4):
            tile.block([Part(bit_codes(tile, word * size, range(8), 0), scale, offset=0.5)])
        tile.advance(4 * size + size // 2)
