"""One and two bits: TQ2_0, TQ1_0, Q2_0, Q1_0. Layouts of blocks: GGML's `ggml-common.h`.

TQ1_0 holds five ternary digits in a byte; taking them apart costs more than reading the 2 bits of TQ2_0, so that its
panels are TQ2_0's (2.06 bits a weight instead of 1.69), exactly the same weights.
"""

from cpu_kernels.dot import Layout, Part, Tile
from cpu_kernels.dot_parts import bit_codes, bits_to_planes, plane_codes
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.quant_types import QuantType
from cpu_kernels.simd import Value

_EVEN_BYTES = 0x00FF00FF


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


class TernaryDigits(TernaryPlanes):
    """TQ1_0, packed as TQ2_0."""

    def __init__(self, quant_type: QuantType) -> None:
        super().__init__(quant_type)
        self.step_row_bytes = 66

    def pack(self, packer: LanePacker) -> None:
        """32 and 16 bytes of five digits, 4 of four, each digit's run of bytes after the other; d."""
        packer.copy_halves(52)
        kernel = packer.kernel
        size = kernel.isa.vector_bytes
        digits = kernel.scratch(64 * size)
        place = 0
        for start, words, count in ((0, 8, 5), (32, 4, 5), (48, 1, 4)):
            for digit in range(count):
                with kernel.loop(0, words) as word:
                    value = _ternary_digit(packer.read(word * 4 + start), digit)
                    kernel.store(value, digits + (word + place) * size)
                place += words
        with kernel.loop(0, 2) as half, kernel.loop(0, 8) as word:
            first = digits + (half * 32 + word) * size
            planes = [kernel.load(kernel.ints, first + plane * 8 * size) for plane in range(4)]
            packer.write(planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6)


def _ternary_digit(packed: Value, digit: int) -> Value:
    """A base-3 digit of every byte that holds a fraction of 256, the most significant being digit 0."""
    halves: list[Value] = []
    for odd in range(2):
        fraction = ((packed >> 8 * odd & _EVEN_BYTES) * 3**digit) & _EVEN_BYTES
        halves.append((fraction * 3 >> 8) & 0x00030003)
    return halves[0] | halves[1] << 8


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
