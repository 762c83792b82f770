"""Kernels that look sums of four activations up in tables (T-MAC, arXiv:2407.00088), for weights of few bits.

weight = scale * (code - offset), and a bit is (1 + b) / 2 with b = +-1, so that activations x give

    scale * (1/2 sum over planes p of factor(p) * entries(p) + (sum of factors / 2 - offset) * sum(x))

Time grows with the bits, unlike that of dot products. Table entries are rounded to int8 (`activations`), which adds
noise of 2e-5 to 4e-5 of the product's variance on Gaussian activations. Panels take GGUF's bytes.
Layouts of blocks: GGML's `ggml-common.h`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from cpu_kernels.activations import TABLE_BLOCK, ActivationKind
from cpu_kernels.dot import Layout, Tile
from cpu_kernels.dot_k import two_bit_scales
from cpu_kernels.dot_k_signed import three_bit_scales
from cpu_kernels.dot_ternary import unpacked_digits
from cpu_kernels.lut_parts import Number, number, plane_word, spread_nibbles, table_sums, write_plane
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.quant_types import QuantType
from cpu_kernels.simd import I16, Value

_RUN = 32  # weights of a plane word
_RUNS = TABLE_BLOCK // _RUN
# At one column, two blocks in a row gave Q1_0 in cache 10%; four made TQ2_0 read 0.82 instead of 0.93 of the bandwidth,
# and at more columns registers run out (Q1_0 at 4: 784 Gmac/s in a loop, 594 unrolled; Zen 5).
_UNROLLED_TURNS = 2


class _Part(NamedTuple):
    """Weights of a block of activations that share a scale: which units of 16, and where half their sum is."""

    units: tuple[int, ...]
    half_sum: int


_WHOLE = _Part((0, 1, 2, 3), Number.HALF_SUM)
_HALVES = tuple(_Part((2 * half, 2 * half + 1), Number.HALF_SUMS_OF_32 + half) for half in range(2))
_QUARTERS = tuple(_Part((unit,), Number.HALF_SUMS_OF_16 + unit) for unit in range(4))


class TableLayout(Layout):
    """What all of them share: a code is the sum over planes of factor * bit; weight = scale * (code - offset)."""

    activation_kind = ActivationKind.TABLES
    factors: tuple[int, ...]  # of the planes, the highest first; one is the next one's double or equal
    offset: float

    def __init__(self, quant_type: QuantType) -> None:
        super().__init__(quant_type)
        self.step_columns = max(quant_type.block_size, TABLE_BLOCK)
        self.step_row_bytes = self.step_columns // quant_type.block_size * quant_type.block_bytes

    def products(self, tile: Tile, offset: int, part: _Part) -> list[Value]:
        """Sums of (code - offset) * x over a part, for each column; its planes lie at `offset`."""
        factor = sum(self.factors) - 2 * self.offset  # of half the sum
        result = []
        for column, total in enumerate(table_sums(tile, offset, self.factors, part.units)):
            scale = number(tile, Number.HALF_SCALE, column)
            if factor:
                result.append(tile.kernel.fma(total, scale, number(tile, part.half_sum, column) * factor))
            else:
                result.append(total * scale)
        return result


class BlockPlanes(TableLayout):
    """64 weights or more a block, one scale. A step: d, then for every 64 weights the planes, the highest first."""

    scale_place = 0  # in GGUF's block
    scale_factor = 1.0

    @abstractmethod
    def runs(self, packer: LanePacker) -> Iterator[list[Value]]:
        """The plane words of each 32 weights of the block, the highest plane first."""

    def pack(self, packer: LanePacker) -> None:
        """The scale, then planes."""
        packer.copy_halves(self.scale_place)
        runs = self.runs(packer)
        for first, second in zip(runs, runs, strict=True):
            for pair in zip(first, second, strict=True):
                for word in pair:
                    write_plane(packer, word)

    def dot(self, tile: Tile) -> None:
        """Sums over the block, then the scale."""
        size = tile.vector_bytes
        scale = tile.load_half(0)
        if self.scale_factor != 1.0:
            scale = scale * self.scale_factor
        tile.advance(size // 2)
        turns = self.step_columns // TABLE_BLOCK
        if tile.columns == 1 and turns <= _UNROLLED_TURNS:
            for _ in range(turns):
                self._block(tile, scale)
        else:
            with tile.kernel.loop(0, turns):
                self._block(tile, scale)

    def _block(self, tile: Tile, scale: Value) -> None:
        _add(tile, self.products(tile, 0, _WHOLE), scale)
        tile.advance(_RUNS * len(self.factors) * tile.vector_bytes)
        tile.activations.add(ActivationKind.TABLES.block_bytes * tile.columns)


class OneBitPlanes(BlockPlanes):
    """Q1_0: weight = 2 d * (bit - 1/2)."""

    factors, offset, scale_factor = (1,), 0.5, 2.0

    def runs(self, packer: LanePacker) -> Iterator[list[Value]]:
        """GGUF's bits are a plane."""
        for run in range(self.step_columns // _RUN):
            word = packer.read(2 + 4 * run)
            yield [spread_nibbles(word) | spread_nibbles(word >> 16) << 4]


class TwoBitPlanes(BlockPlanes):
    """Q2_0: weight = d * (code - 1)."""

    factors, offset = (2, 1), 1.0

    def runs(self, packer: LanePacker) -> Iterator[list[Value]]:
        """Four consecutive codes a byte."""
        for run in range(_RUNS):
            halves = [packer.read(2 + 8 * run + 4 * half) for half in range(2)]
            planes = []
            for bit in (1, 0):
                low, high = (self._nibbles(half >> bit) for half in halves)
                planes.append(low | high << 4)
            yield planes

    def _nibbles(self, word: Value) -> Value:
        """Every second bit of each byte, as a nibble."""
        value = word & 0x55555555
        value = (value | value >> 1) & 0x33333333
        return (value | value >> 2) & 0x0F0F0F0F


class TernaryPlanes(BlockPlanes):
    """TQ2_0: weight = d * (code - 1)."""

    factors, offset, scale_place = (2, 1), 1.0, 64

    def runs(self, packer: LanePacker) -> Iterator[list[Value]]:
        """32 bytes with four runs in their four pairs of bits."""
        for half in range(2):
            words = [packer.read(4 * (8 * half + word)) for word in range(8)]
            for run in range(4):
                yield [plane_word((words[:4], words[4:]), 2 * run + bit) for bit in (1, 0)]


class TernaryDigitPlanes(BlockPlanes):
    """TQ1_0: weight = d * (digit - 1), a digit being the number of its planes' bits that are set.

    With planes of one factor the noise of the tables is 2.5 times smaller than with 2 and 1.
    """

    factors, offset, scale_place = (1, 1), 1.0, 52

    def __init__(self, quant_type: QuantType) -> None:
        super().__init__(quant_type)
        self.step_row_bytes = 66

    def runs(self, packer: LanePacker) -> Iterator[list[Value]]:
        """Digits taken apart."""
        kernel = packer.kernel
        digits = unpacked_digits(packer)
        for run in range(8):
            words = [kernel.load(kernel.ints, digits + (8 * run + word) * kernel.isa.vector_bytes) for word in range(8)]
            halves = [[word | word >> 1 for word in words], words]  # not 0; 2
            yield [plane_word((half[:4], half[4:]), bit) for bit, half in enumerate(halves)]


class NibblePlanes(TableLayout):
    """Q4_0: weight = d * (code - 8). A step of two blocks: each one's planes, the highest first, and both scales.

    A last step of one block gets a second one whose scale is 0.
    """

    factors, offset = (8, 4, 2, 1), 8.0

    def pack(self, packer: LanePacker) -> None:
        """d, then 16 bytes: the codes of the first 16 weights in low nibbles."""
        kernel, size = packer.kernel, self.quant_type.block_bytes
        is_there = packer.columns_left() > _RUN
        starts = (kernel.int64(0), kernel.select(is_there, kernel.int64(size), kernel.int64(0)))
        for start in starts:
            words = [packer.read(start + (2 + 4 * word)) for word in range(4)]
            for bit in reversed(range(4)):
                write_plane(packer, plane_word((words, [word >> 4 for word in words]), bit))
        first, second = (packer.read(start, I16) for start in starts)
        packer.write(first)
        packer.write(kernel.select(is_there, second, kernel.constant(second.type, 0)))

    def dot(self, tile: Tile) -> None:
        """One block after the other."""
        size = tile.vector_bytes
        for half, part in enumerate(_HALVES):
            scale = tile.load_half(8 * size + half * (size // 2))
            _add(tile, self.products(tile, half * 4 * size, part), scale)
        tile.advance(8 * size + size)
        tile.activations.add(ActivationKind.TABLES.block_bytes * tile.columns)


class _Planes16(TableLayout):
    """K-quants with scales for 16 weights: the words of packed scales, then the planes of every 32 weights."""

    def dot(self, tile: Tile) -> None:
        """64 weights a turn; scales are unpacked first, as in `dot_k`."""
        kernel, size = tile.kernel, tile.vector_bytes
        scales, minima = self.scales(tile)
        with kernel.loop(0, self.step_columns // TABLE_BLOCK) as turn:
            for unit, part in enumerate(_QUARTERS):
                place = (turn * 4 + unit) * size
                values = self.products(tile, unit // 2 * len(self.factors) * size, part)
                _add(tile, values, kernel.load(kernel.floats, scales + place))
                if minima is not None:
                    minimum = kernel.load(kernel.floats, minima + place) * -2.0
                    _add(tile, [number(tile, part.half_sum, column) for column in range(tile.columns)], minimum)
            tile.advance(_RUNS * len(self.factors) * size)
            tile.activations.add(ActivationKind.TABLES.block_bytes * tile.columns)

    @abstractmethod
    def scales(self, tile: Tile) -> tuple[Value, Value | None]:
        """Where 16 scales, and 16 minima if there are any, lie as float32; moves past the packed ones."""


class TwoBitPlanesK(_Planes16):
    """Q2_K: weight = d * scale * code - dmin * minimum."""

    factors, offset = (2, 1), 0.0

    def pack(self, packer: LanePacker) -> None:
        """16 bytes of scales and minima, 64 of codes, d, dmin."""
        packer.copy_words(0, 4)
        packer.copy_halves(80)
        packer.copy_halves(82)
        for half in range(2):
            words = [packer.read(16 + 4 * (8 * half + word)) for word in range(8)]
            for run in range(4):
                for bit in (1, 0):
                    write_plane(packer, plane_word((words[:4], words[4:]), 2 * run + bit))

    def scales(self, tile: Tile) -> tuple[Value, Value | None]:
        """As in `dot_k`."""
        return two_bit_scales(tile)


class ThreeBitPlanesK(_Planes16):
    """Q3_K: weight = d * scale * (code - 4)."""

    factors, offset = (4, 2, 1), 4.0

    def pack(self, packer: LanePacker) -> None:
        """32 bytes of high bits (bit g for run g of 32), 64 of low codes, 12 of scales, d."""
        packer.copy_words(96, 3)
        packer.copy_halves(108)
        high = [packer.read(4 * word) for word in range(8)]
        for half in range(2):
            words = [packer.read(32 + 4 * (8 * half + word)) for word in range(8)]
            for run in range(4):
                write_plane(packer, plane_word((high[:4], high[4:]), 4 * half + run))
                for bit in (1, 0):
                    write_plane(packer, plane_word((words[:4], words[4:]), 2 * run + bit))

    def scales(self, tile: Tile) -> tuple[Value, Value | None]:
        """As in `dot_k_signed`."""
        return three_bit_scales(tile), None


def _add(tile: Tile, values: list[Value], scale: Value) -> None:
    """sum += value * scale in every column."""
    for total, value in zip(tile.sums, values, strict=True):
        total.set(tile.kernel.fma(value, scale, total.get()))


LAYOUTS: Mapping[str, Callable[[QuantType], Layout]] = {
    "Q1_0": OneBitPlanes,
    "Q2_0": TwoBitPlanes,
    "TQ1_0": TernaryDigitPlanes,
    "TQ2_0": TernaryPlanes,
    "Q4_0": NibblePlanes,
    "Q2_K": TwoBitPlanesK,
    "Q3_K": ThreeBitPlanesK,
}
