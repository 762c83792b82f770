"""IQ1, IQ2 and IQ3 blocks taken apart: codebook entries to codes of 3 or 4 bits, with their scales, exactly.

A block has eight runs of 32 weights. An entry gives the magnitudes of 8 weights (IQ3: 4), of which there are three
(IQ3: eight), and beside it stand signs (IQ1: the sign of a shift). A code is the magnitude's number, and the sign as
the bit above it. Layouts of blocks: GGML's `ggml-common.h`. Knows nothing about panels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.dot_parts import BYTE_ONES, spread_bits
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.reference.dequantize_iq import codebook
from cpu_kernels.simd import I8, I16, I32, Value


@dataclass(frozen=True, slots=True)
class Run:
    """32 weights of every row: eight words of four codes, and one scale of up to 4 bits for all or for each half."""

    codes: list[Value]
    scales: list[Value]


@cache
def entry_codes(name: str) -> NDArray[np.uint8]:
    """A word for each entry of a codebook: the numbers of its magnitudes in ascending order, (entries, 4).

    Entries of eight have the last four numbers above the first, in bits 2 and 3: one look-up serves both.
    """
    grid = codebook(name)
    codes = np.searchsorted(np.unique(grid), grid).astype(np.uint8)
    if codes.shape[1] == 8:
        codes = codes[:, :4] | codes[:, 4:] << np.uint8(2)
    codes = np.ascontiguousarray(codes)
    codes.setflags(write=False)
    return codes


@cache
def magnitudes(name: str) -> tuple[int, ...]:
    """The values of a codebook's entries, ascending."""
    return tuple(int(value) for value in np.unique(codebook(name)))


def _field(word: Value, shift: int, mask: int) -> Value:
    return (word >> shift) & mask if shift else word & mask


def _wide(packer: LanePacker, offset: Value, element: object) -> Value:
    return packer.read(offset, element).extend(I32, signed=False)


def _with_parity(signs: Value) -> Value:
    """Seven signs and an eighth that makes the number of minus signs even."""
    folded = signs ^ signs >> 4
    folded = folded ^ folded >> 2
    return signs | ((folded ^ folded >> 1) & 1) << 7


def _look_up_eight(packer: LanePacker, index: Value) -> list[Value]:
    """The two words of codes of an entry of 8 weights."""
    both = packer.look_up(index << 2)
    return [_field(both, 2 * half, 0x03030303) for half in range(2)]


def _signed_eights(packer: LanePacker, indices: list[Value], signs: list[Value]) -> list[Value]:
    """Two words of codes for each entry of 8 weights and its byte of signs."""
    return [
        magnitude | spread_bits(_field(sign, 4 * half, 15)) << 2
        for index, sign in zip(indices, signs, strict=True)
        for half, magnitude in enumerate(_look_up_eight(packer, index))
    ]


def _signed_fours(packer: LanePacker, indices: list[Value], signs: list[Value]) -> list[Value]:
    """A word of codes for each entry of 4 weights; every byte of signs serves two."""
    return [
        packer.look_up(index << 2) | spread_bits(_field(signs[place // 2], 4 * (place % 2), 15)) << 3
        for place, index in enumerate(indices)
    ]


def _shifted_eights(packer: LanePacker, indices: list[Value], shifts: list[Value]) -> list[Value]:
    return [
        magnitude | (shift * BYTE_ONES) << 2
        for index, shift in zip(indices, shifts, strict=True)
        for magnitude in _look_up_eight(packer, index)
    ]


def _iq2_xxs(packer: LanePacker, run: Value) -> Run:
    entries, packed = packer.read(run * 8 + 2), packer.read(run * 8 + 6)
    signs = [_with_parity(_field(packed, 7 * place, 127)) for place in range(4)]
    return Run(_signed_eights(packer, [_field(entries, 8 * place, 255) for place in range(4)], signs), [packed >> 28])


def _iq2_xs(packer: LanePacker, run: Value) -> Run:
    words = [packer.read(run * 8 + 2), packer.read(run * 8 + 6)]
    packed = [_field(word, 16 * half, 0xFFFF) for word in words for half in range(2)]
    scales = _wide(packer, run + 66, I8)
    signs = [_with_parity(number >> 9) for number in packed]
    return Run(_signed_eights(packer, [number & 511 for number in packed], signs), [scales & 15, scales >> 4])


def _iq2_s(packer: LanePacker, run: Value) -> Run:
    low, signs = packer.read(run * 4 + 2), packer.read(run * 4 + 34)
    high, scales = _wide(packer, run + 66, I8), _wide(packer, run + 74, I8)
    indices = [_field(low, 8 * place, 255) | _field(high, 2 * place, 3) << 8 for place in range(4)]
    words = _signed_eights(packer, indices, [_field(signs, 8 * place, 255) for place in range(4)])
    return Run(words, [scales & 15, scales >> 4])


def _iq3_xxs(packer: LanePacker, run: Value) -> Run:
    entries = [packer.read(run * 8 + 2), packer.read(run * 8 + 6)]
    packed = packer.read(run * 4 + 66)
    signs = [_with_parity(_field(packed, 7 * place, 127)) for place in range(4)]
    indices = [_field(word, 8 * place, 255) for word in entries for place in range(4)]
    return Run(_signed_fours(packer, indices, signs), [packed >> 28])


def _iq3_s(packer: LanePacker, run: Value) -> Run:
    entries = [packer.read(run * 8 + 2), packer.read(run * 8 + 6)]
    high, signs = _wide(packer, run + 66, I8), packer.read(run * 4 + 74)
    low = [_field(word, 8 * place, 255) for word in entries for place in range(4)]
    indices = [number | _field(high, place, 1) << 8 for place, number in enumerate(low)]
    words = _signed_fours(packer, indices, [_field(signs, 8 * place, 255) for place in range(4)])
    scales = _wide(packer, (run >> 1) + 106, I8) >> packer.splat_int((run & 1) * 4)
    return Run(words, [scales & 15])


def _iq1_s(packer: LanePacker, run: Value) -> Run:
    low, packed = packer.read(run * 4 + 2), _wide(packer, run * 2 + 34, I16)
    indices = [_field(low, 8 * place, 255) | _field(packed, 3 * place, 7) << 8 for place in range(4)]
    return Run(_shifted_eights(packer, indices, [packed >> 15] * 4), [_field(packed, 12, 7)])


def _iq1_m(packer: LanePacker, run: Value) -> Run:
    low, packed = packer.read(run * 4), _wide(packer, run * 2 + 32, I16)
    indices = [_field(low, 8 * place, 255) | _field(packed, 4 * place, 7) << 8 for place in range(4)]
    words = _shifted_eights(packer, indices, [_field(packed, 4 * place + 3, 1) for place in range(4)])
    scales = _wide(packer, (run >> 1) * 2 + 48, I16) >> packer.splat_int((run & 1) * 6)
    return Run(words, [scales & 7, _field(scales, 3, 7)])


RUNS: Mapping[str, Callable[[LanePacker, Value], Run]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
