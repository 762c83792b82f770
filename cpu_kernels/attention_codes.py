"""Products of a few rows with a block of coded keys or values, as parts of the attention kernels.

The other factor is rounded to 16-bit integers with a scale of its own, so that a dot product takes two terms a lane and
sums are exact: queries a row, or a row and block where the channels' scales are taken into them; weights a row, block
and group of channels. That is 2^-16 of the greatest factor, some hundredth of what 8 bits lose. What a row's factors
become depends on that row and what it sees alone. Knows nothing about what rows see.
"""

from cpu_kernels.attention_products import (
    LINE_FLOATS,
    ROWS_AT_ONCE,
    Rows,
    ask,
    folded,
    grouped,
    lines_of,
    vectors_at_once,
)
from cpu_kernels.attention_state import Shape
from cpu_kernels.kv_layout import BLOCK_TOKENS
from cpu_kernels.kv_read import KeyReader, ValueReader
from cpu_kernels.kv_types import LINE_BYTES
from cpu_kernels.simd import F32, I16, I32, Kernel, Value, Variable, is_vector, vector_type
from cpu_kernels.traced import each, spread

WORD_BYTES = 2
MOST = 32767.0
# Of the bits of a float32: as integers magnitudes have the order of what they stand for, NaN above all.
MAGNITUDE = 0x7FFFFFFF


class CodedKeys:
    """Scores of up to `ROWS_AT_ONCE` rows; `prefetch`: asks for the next block while it reads one."""

    def __init__(self, k: Kernel, reader: KeyReader, rows: int, *, prefetch: bool) -> None:
        """`rows`: of a tile, at most."""
        self.k, self.reader, self.prefetch = k, reader, prefetch
        self.by_block = reader.kind.has_minimum
        step, length = reader.kind.step_dims, reader.length
        self.group = length if self.by_block else reader.kind.key_group
        self.groups = [(first, min(self.group, length - first)) for first in range(0, length, self.group)]
        held = ROWS_AT_ONCE if self.by_block else rows
        row_bytes = WORD_BYTES * (-(-length // step) * step)
        self.numbers = Rows(k.scratch(held * row_bytes), row_bytes)
        self.scales = Rows(k.scratch(held * 4), 4)
        self.addends = Rows(k.scratch(held * 4 * len(self.groups)), 4 * len(self.groups))
        self.products = k.scratch(4 * length)

    def take(self, queries: Rows, rows: Value) -> None:
        """Makes integers of a tile's queries, where no block has a part in them."""
        k = self.k
        if self.by_block:
            return
        with k.loop(0, rows) as row:
            query = queries.at(row)
            most = Most(k)
            each(k, k.int64(self.reader.length), lambda at, kind: most.see(k.load(kind, query + at)))
            self._round(query, row, most.value())
            if self.reader.kind.offset:
                for number, (first, dims) in enumerate(self.groups):
                    to = self.addends.at(row) + 4 * number
                    k.store(self._sum(self.numbers.at(row) + WORD_BYTES * first, dims) * -self.reader.kind.offset, to)

    def score(self, keys: Value, queries: Rows, scores: Rows, first: Value, count: int) -> None:
        """Scores of `count` rows from `first` on with a block of keys."""
        k, reader = self.k, self.reader
        row = first
        if self.prefetch:
            codes_bytes = reader.kind.key_codes_bytes(reader.length)
            ask(k, keys, list(range(codes_bytes, reader.block_bytes, LINE_BYTES)), reader.block_bytes)
        if self.by_block:
            row = k.int64(0)
            self._take_channels(keys, queries, first, count)
        for tokens in grouped(list(range(0, BLOCK_TOKENS, k.lanes)), vectors_at_once(k, count)):
            totals: list[list[Value]] = [[] for _ in range(count)]
            for number, (start, dims) in enumerate(self.groups):
                sums = self._multiply(keys, row, tokens, count, number, start, dims)
                if self.by_block:
                    totals = [[total.get().to_float() for total in chain] for chain in sums]
                    continue
                scales = [reader.scales(keys, number, token) for token in tokens]
                for chain, so_far in zip(sums, totals, strict=True):
                    parts = [total.get().to_float() for total in chain]
                    so_far[:] = [
                        k.fma(part, scale, so_far[index]) if so_far else part * scale
                        for index, (part, scale) in enumerate(zip(parts, scales, strict=True))
                    ]
            for index, line in enumerate(totals):
                scale = k.load_splat(F32, self.scales.at(row) + 4 * index)
                to = scores.at(first) + index * scores.row_bytes
                addend = None
                if self.by_block:
                    addend = k.load_splat(F32, self.addends.at(row) + index * self.addends.row_bytes)
                for token, total in zip(tokens, line, strict=True):
                    k.store(total * scale if addend is None else k.fma(total, scale, addend), to + 4 * token)

    def _multiply(
        self, keys: Value, row: Value, tokens: list[int], count: int, number: int, start: int, dims: int
    ) -> list[list[Variable]]:
        """Sums of `dims` dimensions from `start` on, of whole steps, for every row and vector of tokens."""
        k, reader = self.k, self.reader
        step_dims, ahead = reader.kind.step_dims, reader.block_bytes if self.prefetch else 0
        lines = lines_of(token * reader.token_bytes for token in tokens)
        sums = []
        for index in range(count):
            begin = k.constant(k.ints, 0)
            if reader.kind.offset:
                begin = k.load_splat(I32, self.addends.at(row) + (index * self.addends.row_bytes + 4 * number))
            sums.append([k.variable(begin) for _ in tokens])
        block = keys + start // step_dims * reader.step_bytes
        factors = self.numbers.at(row) + WORD_BYTES * start
        with k.loop(0, -(-dims // step_dims)) as step:
            place = block + step * reader.step_bytes
            ask(k, place, lines, ahead)
            for part, vectors in enumerate(reader.codes(place, tokens)):
                at = factors + step * (WORD_BYTES * step_dims) + 2 * WORD_BYTES * part
                add_pairs(k, sums, vectors, [at + index * self.numbers.row_bytes for index in range(count)])
        return sums

    def _take_channels(self, keys: Value, queries: Rows, first: Value, count: int) -> None:
        """Integers of queries times a block's channel scales, and the sums of their products with its minima."""
        k, length = self.k, self.reader.length
        scales, minima = self.reader.channel_scales(keys)
        with k.loop(0, count) as index:
            query = queries.at(first + index)
            most, sums = Most(k), (k.variable(k.constant(k.floats, 0.0)), k.variable(k.constant(F32, 0.0)))

            def body(at: Value, kind: object) -> None:
                halves = vector_type(I16, k.lanes) if is_vector(kind) else I16
                number = k.load(kind, query + at)
                scale, least = (k.half_to_float(k.load(halves, place + (at >> 1))) for place in (scales, minima))
                product = number * scale
                most.see(product)
                k.store(product, self.products + at)
                total = sums[0] if is_vector(kind) else sums[1]
                total.set(k.fma(number, least, total.get()))

            each(k, k.int64(length), body)
            self._round(self.products, index, most.value())
            k.store(k.sum_lanes(sums[0].get()) + sums[1].get(), self.addends.at(index))

    def _round(self, source: Value, row: Value, most: Value) -> None:
        """`length` float32 become a row's integers, and zeros up to a whole step."""
        k, length = self.k, self.reader.length
        to = self.numbers.at(row)
        factor, scale = rounding(k, most)
        k.store(scale, self.scales.at(row))

        def body(at: Value, kind: object) -> None:
            number = k.load(kind, source + at) * spread(k, factor, kind)
            k.store(k.round_to_int(number).truncate(I16), to + (at >> 1))

        each(k, k.int64(length), body)
        for at in range(WORD_BYTES * length, self.numbers.row_bytes, WORD_BYTES):
            k.store(k.constant(I16, 0), to + at)

    def _sum(self, words: Value, count: int) -> Value:
        """Of `count` 16-bit integers."""
        k = self.k
        total = k.variable(k.constant(I32, 0))
        with k.loop(0, count) as index:
            total.add(k.load(I16, words + index * WORD_BYTES).extend(I32, signed=True))
        return total.get()


class CodedValues:
    """Weighted sums of up to `ROWS_AT_ONCE` rows."""

    def __init__(self, k: Kernel, shape: Shape, *, prefetch: bool) -> None:
        self.k, self.prefetch, self.padded = k, prefetch, shape.padded
        self.reader = ValueReader(k, shape.value_type, shape.value_length)
        self.group = self.reader.kind.value_group
        self.groups = -(-shape.value_length // self.group)
        self.numbers = Rows(k.scratch(ROWS_AT_ONCE * self.groups * WORD_BYTES * LINE_FLOATS), WORD_BYTES * LINE_FLOATS)
        self.scales, self.addends = (Rows(k.scratch(ROWS_AT_ONCE * self.groups * 4), 4) for _ in range(2))

    def gather(
        self, states: Rows, kept: list[Value], values: Value, weights: Rows, first: Value, *, terms: Value
    ) -> None:
        """Adds a block of values to the states of rows from `first` on: its first `terms` tokens, weighted.

        `kept`: a factor a row of what states hold. A token of weight 0 may hold anything.
        """
        k, reader, count = self.k, self.reader, len(kept)
        if self.prefetch:
            codes_bytes = reader.kind.value_codes_bytes(reader.length)
            ask(k, values, list(range(codes_bytes, reader.block_bytes, LINE_BYTES)), reader.block_bytes)
        self._take_weights(values, weights, first, count)
        with_addend = reader.kind.has_minimum or reader.kind.offset
        for dims in grouped(list(range(0, self.padded, k.lanes)), vectors_at_once(k, count)):
            sums = [[k.variable(k.constant(k.ints, 0)) for _ in dims] for _ in range(count)]
            places = [[self._place(row, dim) for dim in dims] for row in range(count)]
            lines = lines_of(reader.places(dims))
            with k.loop(0, (terms + (reader.step_tokens - 1)) // reader.step_tokens) as step:
                place = values + step * reader.step_bytes
                ask(k, place, lines, reader.block_bytes if self.prefetch else 0)
                vectors = reader.codes(place, dims)
                for chain, of_row in zip(sums, places, strict=True):
                    pairs = {at: self._pair(at, step) for at in dict.fromkeys(of_row)}
                    for total, vector, at in zip(chain, vectors, of_row, strict=True):
                        total.set(k.dot_words(total.get(), vector, pairs[at]))
            for row, (chain, factor) in enumerate(zip(sums, kept, strict=True)):
                state = states.at(first) + row * states.row_bytes
                for dim, total, at in zip(dims, chain, places[row], strict=True):
                    before = k.load(k.floats, state + 4 * dim) * factor
                    if with_addend:
                        before = before + k.load_splat(F32, self.addends.base + 4 * at)
                    scale = k.load_splat(F32, self.scales.base + 4 * at)
                    k.store(k.fma(total.get().to_float(), scale, before), state + 4 * dim)

    def _place(self, row: int, dim: int) -> int:
        """Which of the rows of integers a dimension takes."""
        return row * self.groups + min(dim // self.group, self.groups - 1)

    def _pair(self, place: int, step: Value) -> Value:
        """The integers of a step's two tokens in every lane."""
        k = self.k
        at = self.numbers.base + place * self.numbers.row_bytes
        return k.load_splat(I32, at + step * (2 * WORD_BYTES)).bitcast(k.words)

    def _take_weights(self, values: Value, weights: Rows, first: Value, count: int) -> None:
        """Integers of weights times the tokens' scales, group by group, and what is added for minima or offsets."""
        k, reader = self.k, self.reader
        tokens, nothing = range(0, BLOCK_TOKENS, k.lanes), k.constant(k.floats, 0.0)
        for group in range(self.groups):
            scales = [reader.scales(values, group, token) for token in tokens]
            minima = [reader.minima(values, group, token) for token in tokens] if reader.kind.has_minimum else []
            with k.loop(0, count) as row:
                line = weights.at(first + row)
                given = [k.load(k.floats, line + 4 * token) for token in tokens]
                unseen = [weight.equals(0.0) for weight in given]
                parts = [
                    k.select(none, nothing, weight * scale)
                    for none, weight, scale in zip(unseen, given, scales, strict=True)
                ]
                most = Most(k)
                for part in parts:
                    most.see(part)
                factor, scale = rounding(k, most.value())
                place = row * self.groups + group
                k.store(scale, self.scales.at(place))
                to = self.numbers.at(place)
                for token, part in zip(tokens, parts, strict=True):
                    k.store(k.round_to_int(part * k.splat(factor)).truncate(I16), to + WORD_BYTES * token)
                if minima:
                    parts = [
                        k.select(none, nothing, weight * least)
                        for none, weight, least in zip(unseen, given, minima, strict=True)
                    ]
                if minima or reader.kind.offset:
                    total = k.sum_lanes(folded(parts, lambda left, right: left + right))
                    k.store(total if minima else total * -float(reader.kind.offset), self.addends.at(place))


class Most:
    """The greatest magnitude of the float32 that were seen, as bits: a NaN is greater than all."""

    def __init__(self, k: Kernel) -> None:
        self.k = k
        self.lanes, self.rest = k.variable(k.constant(k.ints, 0)), k.variable(k.constant(I32, 0))

    def see(self, number: Value) -> None:
        """Takes a vector or a scalar in."""
        most, kind = (self.lanes, self.k.ints) if is_vector(number.type) else (self.rest, I32)
        most.set(self.k.maximum(most.get(), number.bitcast(kind) & MAGNITUDE))

    def value(self) -> Value:
        """It as a float32."""
        return self.k.maximum(self.k.max_lanes(self.lanes.get()), self.rest.get()).bitcast(F32)


def rounding(k: Kernel, most: Value) -> tuple[Value, Value]:
    """What numbers up to `most` are multiplied with to be 16-bit integers, and what one of these stands for.

    Where `most` is not finite, what it stands for is not either.
    """
    return k.select(most.equals(0.0), k.constant(F32, 0.0), MOST / most), most * (1 / MOST)


def add_pairs(k: Kernel, sums: list[list[Variable]], vectors: list[Value], places: list[Value]) -> None:
    """sums[r][v] += both products of vector v's pairs with the two integers at row r's place."""
    for chain, place in zip(sums, places, strict=True):
        pair = k.load_splat(I32, place).bitcast(k.words)
        for vector, total in zip(vectors, chain, strict=True):
            total.set(k.dot_words(total.get(), vector, pair))
