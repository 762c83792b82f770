"""Products of a few rows with a block of keys or values, as parts of the attention kernels.

Scales of coded numbers go into the other factor, or into the sums of a group; minima become one addend a row. Every sum
is one chain in the order of the terms, whatever the number of rows. Knows nothing about what rows see.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cpu_kernels.attention_state import Shape
from cpu_kernels.kv_layout import BLOCK_TOKENS, TILE_DIMS
from cpu_kernels.kv_read import KeyReader, ValueReader, groups_of
from cpu_kernels.kv_types import GROUP, LINE_BYTES
from cpu_kernels.simd import F32, I16, Kernel, Value, Variable, is_vector, vector_type
from cpu_kernels.traced import each

ROWS_AT_ONCE = 4
LINE_FLOATS = BLOCK_TOKENS  # of a row of scores or weights
LONGEST_STEP = 4  # dimensions of keys in a byte, at most


@dataclass(frozen=True, slots=True)
class Factors:
    """Float32 factors of a product: `address` and bytes from row to row, and for every vector where its own begin."""

    address: Value
    row_bytes: int
    offsets: list[int]


class BlockProducts:
    """Up to `ROWS_AT_ONCE` rows times blocks; `prefetch`: asks for the next block while it reads one."""

    def __init__(self, k: Kernel, shape: Shape, *, prefetch: bool) -> None:
        self.k, self.prefetch = k, prefetch
        self.values = ValueReader(k, shape.value_type, shape.value_length)
        self.query_bytes = 4 * -(-shape.key_length // LONGEST_STEP) * LONGEST_STEP  # of a row, filled up with zeros
        halves, self.tiles = BLOCK_TOKENS // GROUP, shape.padded // TILE_DIMS
        self.scaled = k.scratch(ROWS_AT_ONCE * max(halves * self.query_bytes, self.tiles * 4 * LINE_FLOATS))
        self.addends = k.scratch(ROWS_AT_ONCE * 4 * max(halves, self.tiles))

    def score(
        self, reader: KeyReader, keys: Value, queries: Value, tokens: list[int], count: int
    ) -> list[list[Variable]]:
        """Of `count` rows with the vectors that begin at `tokens`."""
        k, kind, length = self.k, reader.kind, reader.length
        ahead = reader.block_bytes if self.prefetch and tokens[0] == 0 else 0
        lines = sorted({token * reader.token_bytes // LINE_BYTES for token in tokens})
        sums = [[k.variable(k.constant(k.floats, 0.0)) for _ in tokens] for _ in range(count)]
        factors = Factors(queries, self.query_bytes, [0 for _ in tokens])
        if kind.has_minimum:
            halves = [token // GROUP for token in tokens]
            factors = Factors(self.scaled, 2 * self.query_bytes, [half * self.query_bytes for half in halves])
            for row, chain in enumerate(sums):
                for half, total in zip(halves, chain, strict=True):
                    total.set(k.load_splat(F32, self.addends + 4 * (2 * row + half)))

        def multiply(into: list[list[Variable]], first: int, dims: int, scaled: Factors) -> None:
            steps = -(-dims // reader.step_dims)
            with k.loop(0, steps) as step:
                place = keys + (step * reader.step_bytes + first // reader.step_dims * reader.step_bytes)
                self._prefetch(place, lines, ahead)
                parts = reader.vectors(place, tokens)
                at = step * (4 * reader.step_dims) + 4 * first
                for part, vectors in enumerate(parts):
                    self._add_products(into, vectors, scaled, at + 4 * part)

        if not kind.is_coded or kind.has_minimum:
            multiply(sums, 0, length, factors)
            return sums
        for number, (first, dims) in enumerate(groups_of(length)):
            part = [[k.variable(k.constant(k.floats, 0.0)) for _ in tokens] for _ in range(count)]
            multiply(part, first, dims, factors)
            scales = [reader.scales(keys, number, token) for token in tokens]
            for chain, totals in zip(part, sums, strict=True):
                for value, total, scale in zip(chain, totals, scales, strict=True):
                    total.set(k.fma(value.get(), scale, total.get()))
        return sums

    def scale_queries(self, reader: KeyReader, keys: Value, queries: Value, count: int) -> None:
        """For 32 tokens at a time: queries times the channels' scales, and their sum of products with the minima."""
        k = self.k
        for row in range(count):
            query = queries + row * self.query_bytes
            for half in range(BLOCK_TOKENS // GROUP):
                scales, minima = reader.channel_scales(keys, half)
                to = self.scaled + (2 * row + half) * self.query_bytes
                sums = k.variable(k.constant(k.floats, 0.0)), k.variable(k.constant(F32, 0.0))

                def body(
                    at: Value,
                    kind: object,
                    query: Value = query,
                    to: Value = to,
                    places: tuple[Value, Value] = (scales, minima),
                    sums: tuple[Variable, Variable] = sums,
                ) -> None:
                    halves = vector_type(I16, k.lanes) if is_vector(kind) else I16
                    number = k.load(kind, query + at)
                    scale, least = (k.half_to_float(k.load(halves, place + (at >> 1))) for place in places)
                    k.store(number * scale, to + at)
                    total = sums[0] if is_vector(kind) else sums[1]
                    total.set(k.fma(number, least, total.get()))

                each(k, k.int64(reader.length), body)
                for at in range(4 * reader.length, self.query_bytes, 4):
                    k.store(k.constant(F32, 0.0), to + at)
                k.store(k.sum_lanes(sums[0].get()) + sums[1].get(), self.addends + 4 * (2 * row + half))

    def gather(
        self,
        state: Value,
        kept: list[Value],
        values: Value,
        weights: Value,
        *,
        dims: list[int],
        state_bytes: int,
        terms: Value,
    ) -> None:
        """Adds a block of values to the vectors of the rows' states that begin at `dims`: its first `terms` tokens,
        weighted. `kept`: factors of what states hold; `weights`: scaled before where values are coded.
        """
        k, reader = self.k, self.values
        tiles = [dim // TILE_DIMS for dim in dims]
        factors = Factors(weights, 4 * LINE_FLOATS, [0 for _ in dims])
        if reader.kind.is_coded:
            offsets = [tile * 4 * LINE_FLOATS for tile in tiles]
            factors = Factors(self.scaled, self.tiles * 4 * LINE_FLOATS, offsets)
        sums = []
        for row, factor in enumerate(kept):
            place = state + row * state_bytes
            chain = [k.load(k.floats, place + 4 * dim) * factor for dim in dims]
            if reader.kind.has_minimum:
                addends = [k.load_splat(F32, self.addends + 4 * (row * self.tiles + tile)) for tile in tiles]
                chain = [total + addend for total, addend in zip(chain, addends, strict=True)]
            sums.append([k.variable(total) for total in chain])
        lines = sorted({place // LINE_BYTES for place in reader.places(dims)})
        with k.loop(0, terms) as token:
            place = values + token * reader.token_bytes
            self._prefetch(place, lines, reader.block_bytes if self.prefetch else 0)
            self._add_products(sums, reader.vectors(place, dims), factors, token * 4)
        self.store(sums, state, state_bytes, [4 * dim for dim in dims])

    def scale_weights(self, values: Value, weights: Value, count: int) -> None:
        """Weights times the tokens' scales, tile by tile, and the sums of their products with the minima."""
        k, reader = self.k, self.values
        tiles, tokens = self.tiles, range(0, BLOCK_TOKENS, k.lanes)
        nothing = k.constant(k.floats, 0.0)
        for tile in range(tiles):
            scales = [reader.scales(values, tile, token) for token in tokens]
            minima = [reader.minima(values, tile, token) for token in tokens] if reader.kind.has_minimum else []
            for row in range(count):
                line = weights + row * 4 * LINE_FLOATS
                to = self.scaled + (row * tiles + tile) * 4 * LINE_FLOATS
                given = [k.load(k.floats, line + 4 * token) for token in tokens]
                for token, weight, scale in zip(tokens, given, scales, strict=True):
                    k.store(weight * scale, to + 4 * token)
                if minima:  # a token that is not seen may hold anything
                    parts = [
                        k.select(weight.equals(0.0), nothing, weight * least)
                        for weight, least in zip(given, minima, strict=True)
                    ]
                    total = k.sum_lanes(folded(parts, lambda left, right: left + right))
                    k.store(total, self.addends + 4 * (row * tiles + tile))

    def prefetch_scales(self, block: Value, offsets: range, ahead: int) -> None:
        """Asks for what follows a block's numbers, in the next block."""
        if self.prefetch:
            for offset in offsets:
                self.k.prefetch(block + (ahead + offset))

    def store(self, sums: list[list[Variable]], to: Value, stride: int, offsets: list[int]) -> None:
        """Stores the vectors of every row at `offsets` from the row's place."""
        for row, chain in enumerate(sums):
            for offset, total in zip(offsets, chain, strict=True):
                self.k.store(total.get(), to + (row * stride + offset))

    def _add_products(self, sums: list[list[Variable]], vectors: list[Value], factors: Factors, at: Value) -> None:
        """sums[r][v] += vector v times its factor for row r, which lies `at` bytes behind the first."""
        k = self.k
        for row, chain in enumerate(sums):
            line = factors.address + at + row * factors.row_bytes
            known = {offset: k.load_splat(F32, line + offset) for offset in dict.fromkeys(factors.offsets)}
            for vector, total, offset in zip(vectors, chain, factors.offsets, strict=True):
                total.set(k.fma(vector, known[offset], total.get()))

    def _prefetch(self, place: Value, lines: list[int], ahead: int) -> None:
        if ahead:
            for line in lines:
                self.k.prefetch(place + (ahead + LINE_BYTES * line))


def folded(values: list[Value], join: Callable[[Value, Value], Value]) -> Value:
    """Neighbors joined until one is left."""
    while len(values) > 1:
        values = [join(values[index], values[index + 1]) for index in range(0, len(values), 2)]
    return values[0]
