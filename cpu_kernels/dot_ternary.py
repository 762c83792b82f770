"""TQ1_0: five ternary digits in a byte, at GGUF's own size. Layout of blocks: GGML's `ggml-common.h`.

A byte is a fraction of 256 whose base-3 digits are the codes, so that digit n of byte q is 3 (3^n q mod 256) / 256
rounded down. Where lookups are wide, panels have bytes of their own instead: the low 6 bits tell the first digit, 21 of
their 64 values each, so that one lookup of 64 gives it, and one of 256 gives the other four digits, two bits each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

from cpu_kernels.dot import Codes, Layout, Part, Tile
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.simd import I8, Kernel, Value

_EVEN_BYTES = 0x00FF00FF
_PLACES_OF_A_DIGIT = 21
_PARTS = ((0, 8, 5), (32, 4, 5), (48, 1, 4))  # first byte, words, digits of a byte


class TernaryDigits(Layout):
    """TQ1_0: weight = d * (digit - 1). A step: d, then eight words, four words and one word of bytes with digits.

    The eight hold five runs of 32 weights, the four five runs of 16, the last four runs of 4.
    """

    unpacks_first = True

    def pack(self, packer: LanePacker) -> None:
        """48 bytes of five digits, 4 of four, d."""
        kernel = packer.kernel
        packer.copy_halves(52)
        if not kernel.isa.has_wide_lookup:
            packer.copy_words(0, 13)
            return
        tables = _tables(kernel, [_own_code(_digits(byte)) for byte in range(256)])
        with kernel.loop(0, 13) as word:
            packer.write(kernel.look_up_256(tables, packer.read(word * 4).bitcast(kernel.bytes)))

    def dot(self, tile: Tile) -> None:
        """Digits of the eight words, then those of the five."""
        size = tile.vector_bytes
        scale = tile.load_half(0)
        tile.advance(size // 2)
        runs = _digit_codes(tile, [word * size for word in range(8)], 5)
        for run in runs:
            tile.block([Part(run, scale, offset=1.0)])
        tile.advance(8 * size)
        runs = _digit_codes(tile, [word * size for word in range(4)], 5)
        last = [run[0] for run in _digit_codes(tile, [4 * size], 4)]
        for codes in ([*runs[0], *runs[1]], [*runs[2], *runs[3]], [*runs[4], *last]):
            tile.block([Part(codes, scale, offset=1.0)])
        tile.advance(5 * size)


def _digit_codes(tile: Tile, offsets: list[int], count: int) -> list[Codes]:
    """For each of `count` digits the code vectors of the bytes at the offsets; to be asked for digit by digit."""
    digits = _table_digits if tile.kernel.isa.has_wide_lookup else _multiplied_digits
    return digits(tile, offsets, count)


def _table_digits(tile: Tile, offsets: list[int], count: int) -> list[Codes]:
    kernel = tile.kernel
    top = kernel.table(I8, [min(place // _PLACES_OF_A_DIGIT, 2) for place in range(64)])
    digits = {_own_code(digits): digits for digits in product(range(3), repeat=5)}
    fields = [sum(digit << 2 * place for place, digit in enumerate(digits.get(code, ())[1:])) for code in range(256)]
    tables = _tables(kernel, fields)
    rest: dict[int, Value] = {}

    def first(offset: int) -> Value:
        packed = tile.load(offset)
        rest[offset] = kernel.look_up_256(tables, packed)
        return kernel.look_up_wide(top, packed)

    def later(digit: int, offset: int) -> Value:
        return kernel.byte_shift(rest[offset], 2 * (digit - 1), 3)

    makers: list[Callable[[int], Value]] = [first, *(partial(later, digit) for digit in range(1, count))]
    return [[partial(maker, offset) for offset in offsets] for maker in makers]


def _multiplied_digits(tile: Tile, offsets: list[int], count: int) -> list[Codes]:
    fractions: dict[int, Value] = {}

    def code(digit: int, offset: int) -> Value:
        fraction = fractions[offset] if digit else tile.load(offset)
        fractions[offset] = fraction + (fraction + fraction)
        return _top_digit(fraction)

    return [[partial(code, digit, offset) for offset in offsets] for digit in range(count)]


def _top_digit(fraction: Value) -> Value:
    """3 q / 256 rounded down, for every byte q, as the number of thirds that q has reached."""
    signed = fraction ^ -128
    reached = [(signed > third - 129).extend(I8, signed=True) for third in (86, 171)]
    return -(reached[0] + reached[1])


def _digits(byte: int) -> tuple[int, ...]:
    return tuple((byte * 3**place & 255) * 3 >> 8 for place in range(5))


def _own_code(digits: tuple[int, ...]) -> int:
    """The byte for five digits: low 6 bits by the first digit and a number of the others, high bits for the rest."""
    high, low = divmod(digits[1] + 3 * digits[2] + 9 * digits[3] + 27 * digits[4], _PLACES_OF_A_DIGIT)
    return digits[0] * _PLACES_OF_A_DIGIT + low | high << 6


def _tables(kernel: Kernel, entries: Sequence[int]) -> list[Value]:
    """256 unsigned bytes for `look_up_256`."""
    signed = [entry - 256 if entry > 127 else entry for entry in entries]
    return [kernel.table(I8, signed[start : start + 64]) for start in range(0, 256, 64)]


def unpacked_digits(packer: LanePacker) -> Value:
    """Takes the digits of a block of every row apart; gives where 64 vectors with a byte a weight, in order, lie."""
    kernel = packer.kernel
    size = kernel.isa.vector_bytes
    digits = kernel.scratch(64 * size)
    place = 0
    for start, words, count in _PARTS:
        for digit in range(count):
            with kernel.loop(0, words) as word:
                value = _ternary_digit(packer.read(word * 4 + start), digit)
                kernel.store(value, digits + (word + place) * size)
            place += words
    return digits


def _ternary_digit(packed: Value, digit: int) -> Value:
    """A base-3 digit of every byte of 32-bit lanes."""
    halves: list[Value] = []
    for odd in range(2):
        fraction = ((packed >> 8 * odd & _EVEN_BYTES) * 3**digit) & _EVEN_BYTES
        halves.append((fraction * 3 >> 8) & 0x00030003)
    return halves[0] | halves[1] << 8
