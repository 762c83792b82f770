"""4-bit codes in blocks of 32, the low nibbles of 16 bytes before the high ones: Q4_0, Q4_1, IQ4_NL, MXFP4; and NVFP4.

Layouts of blocks: GGML's `ggml-common.h`; MXFP4: OCP Microscaling Formats 1.0.
"""

from collections.abc import Callable
from functools import partial

from cpu_kernels.dot import Codes, Layout, Part, Tile
from cpu_kernels.dot_parts import plane_codes
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.simd import I8, I32, Value, vector_type

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_VECTORS = 4  # of the codes of 32 weights


def nibble_codes(tile: Tile, offset: int) -> Codes:
    """The eight code vectors of 32 weights whose bytes begin at `offset`."""
    size, kernel = tile.vector_bytes, tile.kernel
    packed: dict[int, Value] = {}

    def low(index: int) -> Value:
        packed[index] = tile.load(offset + index * size)
        return packed[index] & 15

    def high(index: int) -> Value:
        return kernel.byte_shift(packed[index], 4, 15)

    return [partial(code, index) for code in (low, high) for index in range(_VECTORS)]


def table_codes(tile: Tile, codes: Codes, table: Value) -> Codes:
    """Codes looked up in a table of 16 bytes."""

    def found(code: Callable[[], Value]) -> Value:
        return tile.kernel.look_up(table, code())

    return [partial(found, code) for code in codes]


class OffsetNibbles(Layout):
    """Q4_0: weight = d * (code - 8). A step: four vectors of codes, then the scales."""

    unrolled_steps = 2

    def pack(self, packer: LanePacker) -> None:
        """d, then 16 bytes of codes."""
        packer.copy_words(2, _VECTORS)
        packer.copy_halves(0)

    def dot(self, tile: Tile) -> None:
        """Unsigned codes, corrected by 8 times the activations' sum."""
        size = tile.vector_bytes
        tile.block([Part(nibble_codes(tile, 0), tile.load_half(_VECTORS * size), offset=8.0)])
        tile.advance(_VECTORS * size + size // 2)


class ShiftedNibbles(Layout):
    """Q4_1: weight = d * code + m. A step: codes, scales, minima."""

    def pack(self, packer: LanePacker) -> None:
        """d, m, then 16 bytes of codes."""
        packer.copy_words(4, _VECTORS)
        packer.copy_halves(0)
        packer.copy_halves(2)

    def dot(self, tile: Tile) -> None:
        """Unsigned codes; m is the negative of a minimum that is taken off."""
        size = tile.vector_bytes
        scale = tile.load_half(_VECTORS * size)
        minimum = -tile.load_half(_VECTORS * size + size // 2)
        tile.block([Part(nibble_codes(tile, 0), scale)], [minimum])
        tile.advance(_VECTORS * size + size)


class TableNibbles(OffsetNibbles):
    """IQ4_NL: weight = d * value of the code in a table of signed bytes. A step as Q4_0's."""

    def dot(self, tile: Tile) -> None:
        """Codes through the byte table."""
        size = tile.vector_bytes
        table, offset = tile.signed_table(IQ4_VALUES)
        codes = table_codes(tile, nibble_codes(tile, 0), table)
        scale = tile.load_half(_VECTORS * size)
        tile.block([Part(codes, scale, offset, is_signed=not tile.kernel.isa.unsigned_bytes)])
        tile.advance(_VECTORS * size + size // 2)


class ScaledFloats(Layout):
    """MXFP4: E2M1 codes with an E8M0 scale (a power of two) for 32. A step: codes, then one byte of scale a row."""

    unrolled_steps = 2

    def pack(self, packer: LanePacker) -> None:
        """e, then 16 bytes of codes."""
        packer.copy_words(1, _VECTORS)
        packer.copy_bytes(0)

    def dot(self, tile: Tile) -> None:
        """Codes stand for doubled values plus 16, so that they are unsigned on every ISA; scale 2^(e - 128)."""
        kernel, size = tile.kernel, tile.vector_bytes
        table = kernel.byte_table([value + 16 for value in E2M1_DOUBLED])
        codes = table_codes(tile, nibble_codes(tile, 0), table)
        exponent = tile.load(_VECTORS * size, vector_type(I8, kernel.lanes)).extend(I32, signed=False)
        normal = (exponent - 1) << 23
        subnormal = (exponent + 1) << 21  # 2^-128 and 2^-127
        scale = kernel.select(exponent > 1, normal, subnormal).bitcast(kernel.floats)
        tile.block([Part(codes, scale, offset=16.0)])
        tile.advance(_VECTORS * size + size // 4)


class ScaledFloatsOf16(Layout):
    """NVFP4: E2M1 codes with an unsigned E4M3 scale for 16. A step of 64: a word of four scales, then codes."""

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """4 bytes of scales, then 8 bytes of codes for every 16 weights, low nibbles first."""
        packer.copy_words(0, 9)

    def dot(self, tile: Tile) -> None:
        """Two runs of 16 a block."""
        kernel, size = tile.kernel, tile.vector_bytes
        table = kernel.byte_table([value + 16 for value in E2M1_DOUBLED])
        word = tile.load(0, kernel.ints)
        scales = [self._scale(tile, (word >> 8 * run) & 127) for run in range(4)]
        for block in range(2):
            codes = []
            for run in range(2):
                offset = size * (1 + 4 * block + 2 * run)
                codes += [*plane_codes(tile, offset, 2, 0, 15), *plane_codes(tile, offset, 2, 4, 15)]
            found = table_codes(tile, codes, table)
            first, second = scales[2 * block : 2 * block + 2]
            tile.block([Part(found[:4], first, 16.0), Part(found[4:], second, 16.0)])
        tile.advance(9 * size)

    def _scale(self, tile: Tile, code: Value) -> Value:
        """Half of the number: bias 7, below exponent 1 a multiple of 2^-9, NaN (127) counts as 0."""
        kernel = tile.kernel
        normal = ((code << 20) + ((127 - 8) << 23)).bitcast(kernel.floats)
        scale = kernel.select(code < 8, code.to_float() * 2.0**-10, normal)
        return kernel.select(code.equals(127), kernel.constant(kernel.floats, 0.0), scale)
