"""IQ1, IQ2 and IQ3: entries of codebooks re-coded, exactly, as 3-bit or 4-bit codes of a table in a register.

Looking entries up in memory while multiplying is what makes these types slow elsewhere; the panels take more bytes than
GGUF's blocks (3.3 bits a weight for IQ1 and IQ2, 4.3 for IQ3) and are read at full speed. A step of 256 weights: two
words of sixteen 4-bit scales, d, codes. weight = d * factor * (2 * scale + 1) * value of the code.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.dot import Codes, Layout, Part, Tile
from cpu_kernels.dot_4bit import nibble_codes, table_codes
from cpu_kernels.dot_parts import BYTE_ONES, bit_codes, joined, plane_codes, store_scales
from cpu_kernels.pack_codebook import RUNS, entry_codes, magnitudes
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.quant_types import QuantType
from cpu_kernels.simd import I16

_FACTORS: Mapping[str, float] = {
    "IQ1_S": 1 / 8,
    "IQ1_M": 1 / 8,
    "IQ2_XXS": 1 / 8,
    "IQ2_XS": 1 / 8,
    "IQ2_S": 1 / 8,
    "IQ3_XXS": 1 / 4,
    "IQ3_S": 1.0,
}
_SCALES_OF_HALVES = frozenset({"IQ1_M", "IQ2_XS", "IQ2_S"})
_TABLE_OFFSET = 64  # entries are above -64, so that unsigned ones are below 128, which every ISA multiplies


class Codebook(Layout):
    """A step has 106 bytes a row (IQ3: 138)."""

    unpacks_first = True

    def __init__(self, quant_type: QuantType) -> None:
        super().__init__(quant_type)
        self._name = quant_type.name
        self._is_wide = self._name.startswith("IQ3")
        self.step_row_bytes = 10 + (128 if self._is_wide else 96)

    def pack_table(self) -> NDArray[np.uint8]:
        """The codebook as words of the numbers of magnitudes."""
        return entry_codes(self._name)

    def pack(self, packer: LanePacker) -> None:
        """All codes and scales into memory, then the panel's order."""
        kernel = packer.kernel
        size = kernel.isa.vector_bytes
        codes, scales = kernel.scratch(64 * size), kernel.scratch(16 * size)
        with kernel.loop(0, 8) as number:
            run = RUNS[self._name](packer, number)
            for place, word in enumerate(run.codes):
                kernel.store(word, codes + (number * 8 + place) * size)
            for half in range(2):
                kernel.store(run.scales[half % len(run.scales)], scales + (number * 2 + half) * size)
        for pair in range(2):
            packed = kernel.constant(kernel.ints, 0)
            for index in range(8):
                packed = packed | kernel.load(kernel.ints, scales + (8 * pair + index) * size) << 4 * index
            packer.write(packed)
        self._pack_d(packer)
        if self._is_wide:
            with kernel.loop(0, 8) as number, kernel.loop(0, 4) as word:
                first = codes + (number * 8 + word) * size
                packer.write(kernel.load(kernel.ints, first) | kernel.load(kernel.ints, first + 4 * size) << 4)
            return
        with kernel.loop(0, 2) as part:
            group = codes + part * (32 * size)
            with kernel.loop(0, 4) as word:
                packed = kernel.constant(kernel.ints, 0)
                for bit in range(8):
                    value = kernel.load(kernel.ints, group + (word + (8 * (bit % 4) + 4 * (bit // 4))) * size)
                    packed = packed | (value >> 2 & BYTE_ONES) << bit
                packer.write(packed)
            with kernel.loop(0, 8) as word:
                packed = kernel.constant(kernel.ints, 0)
                for plane in range(4):
                    value = kernel.load(kernel.ints, group + (word + 8 * plane) * size)
                    packed = packed | (value & 0x03030303) << 2 * plane
                packer.write(packed)

    def _pack_d(self, packer: LanePacker) -> None:
        if self._name != "IQ1_M":
            packer.copy_halves(0)
            return
        # Four nibbles of d stand above the scales, the lowest first.
        first, second = packer.read(48), packer.read(52)
        d = (first >> 12 & 15) | (first >> 28) << 4 | (second >> 12 & 15) << 8 | (second >> 28) << 12
        packer.write(d.truncate(I16))

    def dot(self, tile: Tile) -> None:
        """A half of the step a turn; 4-bit codes a quarter."""
        kernel, size = tile.kernel, tile.vector_bytes
        words = [tile.load(word * size, kernel.ints) for word in range(2)]
        numbers = [((word >> 4 * place & 15) << 1) + 1 for word in words for place in range(8)]
        scales = store_scales(tile, numbers, tile.load_half(2 * size) * _FACTORS[self._name])
        table = kernel.byte_table(self._table())
        tile.advance(2 * size + size // 2)
        turns, runs = (4, 2) if self._is_wide else (2, 4)
        with kernel.loop(0, turns) as turn:
            for run in range(runs):
                codes = table_codes(tile, self._codes(tile, run), table)
                place = scales + (turn * runs + run) * (2 * size)
                halves = [kernel.load(kernel.floats, place + size * half) for half in range(2)]
                if self._name in _SCALES_OF_HALVES:
                    parts = [Part(codes[4 * h : 4 * h + 4], halves[h], _TABLE_OFFSET) for h in range(2)]
                else:
                    parts = [Part(codes, halves[0], _TABLE_OFFSET)]
                tile.block(parts)
            tile.advance(size * (8 if self._is_wide else 12))

    def _codes(self, tile: Tile, run: int) -> Codes:
        size = tile.vector_bytes
        if self._is_wide:
            return nibble_codes(tile, 4 * size * run)
        low = plane_codes(tile, 4 * size, 8, 2 * run, 3)
        signs = [bit_codes(tile, (v % 4) * size, [4 * (v // 4) + run], 2)[0] for v in range(8)]
        return joined(low, signs)

    def _table(self) -> list[int]:
        values = magnitudes(self._name)
        if self._name.startswith("IQ1"):
            entries = [*(8 * value + 1 for value in values), 0, *(8 * value - 1 for value in values), 0]
        elif self._is_wide:
            entries = [*values, *(-value for value in values)]
        else:
            entries = [*values, 0, *(-value for value in values), 0]
        return [entries[code % len(entries)] + _TABLE_OFFSET for code in range(16)]
