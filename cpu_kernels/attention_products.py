"""Products of a few rows with a block of keys or values in float16, as parts of the attention kernels.

Every sum is one chain in the order of the terms, whatever the number of rows. Coded types have theirs in
`attention_codes`. Knows nothing about what rows see.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cpu_kernels.attention_state import Shape
from cpu_kernels.kv_layout import BLOCK_TOKENS
from cpu_kernels.kv_read import KeyReader, ValueReader
from cpu_kernels.kv_types import LINE_BYTES
from cpu_kernels.simd import F32, Kernel, Value, Variable

ROWS_AT_ONCE = 4
LINE_FLOATS = BLOCK_TOKENS  # of a row of scores or weights


@dataclass(frozen=True, slots=True)
class Rows:
    """Where numbers of a tile's rows lie: those of its first row, and bytes from row to row."""

    base: Value
    row_bytes: int

    def at(self, row: Value) -> Value:
        """The place of a row."""
        return self.base + row * self.row_bytes


class FloatKeys:
    """Scores of up to `ROWS_AT_ONCE` rows; `prefetch`: asks for the next block while it reads one."""

    def __init__(self, k: Kernel, reader: KeyReader, *, prefetch: bool) -> None:
        self.k, self.reader, self.prefetch = k, reader, prefetch

    def take(self, queries: Rows, rows: Value) -> None:
        """Nothing is to be made of a tile's queries."""

    def score(self, keys: Value, queries: Rows, scores: Rows, first: Value, count: int) -> None:
        """Scores of `count` rows from `first` on with a block of keys."""
        k, reader = self.k, self.reader
        line = queries.at(first)
        for tokens in grouped(list(range(0, BLOCK_TOKENS, k.lanes)), vectors_at_once(k, count)):
            sums = [[k.variable(k.constant(k.floats, 0.0)) for _ in tokens] for _ in range(count)]
            lines = lines_of(token * reader.token_bytes for token in tokens)
            with k.loop(0, reader.length) as dim:
                place = keys + dim * reader.step_bytes
                ask(k, place, lines, reader.block_bytes if self.prefetch else 0)
                vectors = reader.floats(place, tokens)
                factors = [k.load_splat(F32, line + dim * 4 + row * queries.row_bytes) for row in range(count)]
                _add_products(k, sums, vectors, factors)
            store(k, sums, scores.at(first), scores.row_bytes, [4 * token for token in tokens])


class FloatValues:
    """Weighted sums of up to `ROWS_AT_ONCE` rows."""

    def __init__(self, k: Kernel, shape: Shape, *, prefetch: bool) -> None:
        self.k, self.prefetch, self.padded = k, prefetch, shape.padded
        self.reader = ValueReader(k, shape.value_type, shape.value_length)

    def gather(
        self, states: Rows, kept: list[Value], values: Value, weights: Rows, first: Value, *, terms: Value
    ) -> None:
        """Adds a block of values to the states of rows from `first` on: its first `terms` tokens, weighted.

        `kept`: a factor a row of what states hold.
        """
        k, reader, count = self.k, self.reader, len(kept)
        line = weights.at(first)
        for dims in grouped(list(range(0, self.padded, k.lanes)), vectors_at_once(k, count)):
            sums = [
                [
                    k.variable(k.load(k.floats, states.at(first) + (row * states.row_bytes + 4 * dim)) * factor)
                    for dim in dims
                ]
                for row, factor in enumerate(kept)
            ]
            lines = lines_of(reader.places(dims))
            with k.loop(0, terms) as token:
                place = values + token * reader.step_bytes
                ask(k, place, lines, reader.block_bytes if self.prefetch else 0)
                factors = [k.load_splat(F32, line + token * 4 + row * weights.row_bytes) for row in range(count)]
                _add_products(k, sums, reader.floats(place, dims), factors)
            store(k, sums, states.at(first), states.row_bytes, [4 * dim for dim in dims])


def _add_products(k: Kernel, sums: list[list[Variable]], vectors: list[Value], factors: list[Value]) -> None:
    """sums[r][v] += vector v times the factor of row r."""
    for chain, factor in zip(sums, factors, strict=True):
        for vector, total in zip(vectors, chain, strict=True):
            total.set(k.fma(vector, factor, total.get()))


def vectors_at_once(k: Kernel, rows: int) -> int:
    """So many that sums, factors and vectors fit the registers."""
    return 4 if k.lanes == 16 or rows < ROWS_AT_ONCE else 2


def grouped(items: list[int], size: int) -> list[list[int]]:
    """Neighbors together, at most so many."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def lines_of(offsets: Iterable[int]) -> list[int]:
    """Offsets of the cache lines in which these lie."""
    return sorted({offset // LINE_BYTES * LINE_BYTES for offset in offsets})


def ask(k: Kernel, place: Value, lines: list[int], ahead: int) -> None:
    """Asks for cache lines as far ahead; for none if that is 0."""
    if ahead:
        for line in lines:
            k.prefetch(place, ahead + line)


def store(k: Kernel, sums: list[list[Variable]], to: Value, stride: int, offsets: list[int]) -> None:
    """Stores the vectors of every row at `offsets` from the row's place."""
    for row, chain in enumerate(sums):
        for offset, total in zip(offsets, chain, strict=True):
            k.store(total.get(), to + (row * stride + offset))


def folded(values: list[Value], join: Callable[[Value, Value], Value]) -> Value:
    """Neighbors joined until one is left."""
    while len(values) > 1:
        values = [join(values[index], values[index + 1]) for index in range(0, len(values), 2)]
    return values[0]
