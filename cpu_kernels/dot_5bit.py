"""5-bit codes in blocks of 32: Q5_0 and Q5_1. Layouts of blocks: GGML's `ggml-common.h`.

A step: four vectors of nibbles, a word a row of fifth bits (bit v of a byte for code vector v), scales (and minima).
"""

from cpu_kernels.dot import Codes, Layout, Part, Tile
from cpu_kernels.dot_4bit import nibble_codes
from cpu_kernels.dot_parts import bit_codes, bits_to_planes, joined
from cpu_kernels.pack_lanes import LanePacker


def _codes(tile: Tile) -> Codes:
    return joined(nibble_codes(tile, 0), bit_codes(tile, 4 * tile.vector_bytes, range(8), 4))


class OffsetFiveBit(Layout):
    """Q5_0: weight = d * (code - 16)."""

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """d, a word of fifth bits, 16 bytes of nibbles."""
        packer.copy_words(6, 4)
        packer.write(bits_to_planes(packer.read(2)))
        packer.copy_halves(0)

    def dot(self, tile: Tile) -> None:
        """Unsigned codes, corrected by 16 times the activations' sum."""
        size = tile.vector_bytes
        tile.block([Part(_codes(tile), tile.load_half(5 * size), offset=16.0)])
        tile.advance(5 * size + size // 2)


class ShiftedFiveBit(Layout):
    """Q5_1: weight = d * code + m."""

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """d, m, a word of fifth bits, 16 bytes of nibbles."""
        packer.copy_words(8, 4)
        packer.write(bits_to_planes(packer.read(4)))
        packer.copy_halves(0)
        packer.copy_halves(2)

    def dot(self, tile: Tile) -> None:
        """Unsigned codes; m is the negative of a minimum that is taken off."""
        size = tile.vector_bytes
        scale, minimum = tile.load_half(5 * size), -tile.load_half(5 * size + size // 2)
        tile.block([Part(_codes(tile), scale)], [minimum])
        tile.advance(6 * size)
