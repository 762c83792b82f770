"""One tile of attention as a part of kernels: rows of queries that go together over the blocks of one KV head.

Keys of coded types with a window are gone through twice, each row seeing other tokens: full blocks before its own as
codes, then its own block in float16. What a row sees of either depends on its position alone.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from cpu_kernels.attention_products import LINE_FLOATS, ROWS_AT_ONCE, BlockProducts, folded
from cpu_kernels.attention_state import NOTHING, Shape, clear_state, state_floats
from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS
from cpu_kernels.kv_read import KeyReader
from cpu_kernels.kv_types import LINE_BYTES, KVType
from cpu_kernels.simd import F32, I32, Kernel, Value
from cpu_kernels.traced import each, exp, spread, tanh

TILE_ROWS = 32
NO_WINDOW = 1 << 40


@dataclass(frozen=True, slots=True)
class Pass:
    """Blocks that are gone through: how keys are read, where they lie, which tokens a row sees, the blocks."""

    reader: KeyReader
    cache: Value
    seen: Value  # int32 pairs: the first position a row sees, the first it does not
    first: Value
    last: Value


class Tile:
    """The rows of one tile of one KV head: where their queries, scores and states lie, and the code that fills them."""

    def __init__(self, k: Kernel, shape: Shape, *, prefetch: bool) -> None:
        """Reads arguments 0-8 of the operation, and 15 for the window of keys; the rest is set by `begin`."""
        self.k, self.shape, self.prefetch = k, shape, prefetch
        self.queries, self.query_stride, self.key_cache, self.value_cache = (k.arg(index) for index in range(4))
        self.kv_heads, self.group = k.arg(4), k.arg(5)
        self.scale, self.window, self.cap = k.float_arg(6), k.arg(7), k.float_arg(8)
        self.keys = KeyReader(k, shape.key_type, shape.key_length)
        self.products = BlockProducts(k, shape, prefetch=prefetch)
        self.values, self.query_bytes = self.products.values, self.products.query_bytes
        self.has_window = shape.key_type.has_minimum
        self.state_bytes = 4 * state_floats(shape.value_length)
        self.query_rows = k.scratch(TILE_ROWS * self.query_bytes)
        self.scores = k.scratch(TILE_ROWS * 4 * LINE_FLOATS)
        self.factors = k.scratch(TILE_ROWS * 4)
        self.seen = k.scratch(TILE_ROWS * 8)
        self.seen_window = k.scratch(TILE_ROWS * 8) if self.has_window else self.seen

    def begin(self, kv_head: Value, first_token: Value, tokens: Value, start: Value) -> None:
        """Takes the rows of `tokens` queries from `first_token` on, scaled, and what each sees."""
        k, length = self.k, self.shape.key_length
        self.rows = tokens * self.group
        self.kv_head = kv_head
        self.first = start + first_token
        self.first_seen = k.maximum(self.first - self.window + 1, k.int64(0))
        self.end_seen = self.first + tokens
        with k.loop(0, self.rows) as row:
            token, head = row // self.group, kv_head * self.group + row % self.group
            query = self.queries + (first_token + token) * self.query_stride + head * (4 * length)
            to = self.query_rows + row * self.query_bytes
            each(
                k,
                k.int64(length),
                lambda at, kind: k.store(k.load(kind, query + at) * spread(k, self.scale, kind), to + at),
            )
            for at in range(4 * length, self.query_bytes, 4):
                k.store(k.constant(F32, 0.0), to + at)
            position = self.first + token
            first, own = k.maximum(position - self.window + 1, k.int64(0)), position // BLOCK_TOKENS * BLOCK_TOKENS
            self._see(self.seen, row, first, own if self.has_window else position + 1)
            if self.has_window:
                self._see(self.seen_window, row, k.maximum(first, own), position + 1)

    def _see(self, table: Value, row: Value, first: Value, end: Value) -> None:
        self.k.store(first.truncate(I32), table + row * 8)
        self.k.store(end.truncate(I32), table + row * 8 + 4)

    def fresh(self, states: Value) -> None:
        """Empties the rows' states."""
        k = self.k
        with k.loop(0, self.rows) as row:
            clear_state(k, states + row * self.state_bytes, self.shape)

    def piece(self, states: Value, piece: Value) -> None:
        """Gathers from the tokens of one piece that some row sees."""
        k = self.k
        # where the head's blocks would begin if all before the piece were its own
        before = (piece * (self.kv_heads - 1) + self.kv_head) * PIECE_BLOCKS
        values = self.value_cache + before * self.values.block_bytes
        for part in self._passes(piece):
            keys = part.cache + before * part.reader.block_bytes
            with k.loop(part.first, part.last) as block:
                self._score(part.reader, keys + block * part.reader.block_bytes)
                for count, row in self._row_groups():
                    with row as first:
                        rows = [first + index for index in range(count)]
                        self._weigh(states, rows, block * BLOCK_TOKENS, part.seen)
                self._gather(states, values + block * self.values.block_bytes, block)

    def _passes(self, piece: Value) -> list[Pass]:
        k = self.k
        first = k.maximum(piece * PIECE_BLOCKS, self.first_seen // BLOCK_TOKENS)
        last = k.minimum((piece + 1) * PIECE_BLOCKS, (self.end_seen + (BLOCK_TOKENS - 1)) // BLOCK_TOKENS)
        if not self.has_window:
            return [Pass(self.keys, self.key_cache, self.seen, first, last)]
        halves = KeyReader(k, KVType.F16, self.shape.key_length)
        full = k.minimum((piece + 1) * PIECE_BLOCKS, (self.end_seen - 1) // BLOCK_TOKENS)
        own = k.maximum(piece * PIECE_BLOCKS, self.first // BLOCK_TOKENS)
        return [
            Pass(self.keys, self.key_cache, self.seen, first, full),
            Pass(halves, k.arg(15), self.seen_window, own, last),
        ]

    def _score(self, reader: KeyReader, keys: Value) -> None:
        """Scores of all rows with a block of keys."""
        k = self.k
        codes_bytes = reader.kind.key_codes_bytes(reader.length)
        self.products.prefetch_scales(keys, range(codes_bytes, reader.block_bytes, LINE_BYTES), reader.block_bytes)
        for count, row in self._row_groups():
            with row as first:
                queries = self.query_rows + first * self.query_bytes
                if reader.kind.has_minimum:
                    self.products.scale_queries(reader, keys, queries, count)
                for tokens in _groups(list(range(0, BLOCK_TOKENS, k.lanes)), self._vectors_at_once(count)):
                    sums = self.products.score(reader, keys, queries, tokens, count)
                    to = self.scores + first * (4 * LINE_FLOATS)
                    self.products.store(sums, to, 4 * LINE_FLOATS, [4 * token for token in tokens])

    def _weigh(self, states: Value, rows: list[Value], first_token: Value, seen_by: Value) -> None:
        """Scores become weights; a state's m and l follow, and the factor for what was gathered before.

        Several rows go in step: one row alone waits for its own sums and exponentials.
        """
        k = self.k
        lines = [self.scores + row * (4 * LINE_FLOATS) for row in rows]
        tails = [states + row * self.state_bytes + 4 * self.shape.padded for row in rows]
        sees = [self._sees(seen_by + row * 8, first_token) for row in rows]
        nothing, none = k.constant(k.floats, NOTHING), k.constant(k.floats, 0.0)
        scores = [
            [k.select(seen, self._score_at(line, index), nothing) for index, seen in enumerate(row)]
            for line, row in zip(lines, sees, strict=True)
        ]
        before = [k.load(F32, tail) for tail in tails]
        most = [k.maximum(k.max_lanes(folded(row, k.maximum)), old) for row, old in zip(scores, before, strict=True)]
        factors = [exp(k, old - new) for old, new in zip(before, most, strict=True)]
        weights = [
            [k.select(seen, exp(k, score - k.splat(new)), none) for score, seen in zip(row, row_sees, strict=True)]
            for row, row_sees, new in zip(scores, sees, most, strict=True)
        ]
        totals = [k.sum_lanes(folded(row, lambda left, right: left + right)) for row in weights]
        for index, row in enumerate(rows):
            for place, weight in enumerate(weights[index]):
                k.store(weight, lines[index] + 4 * k.lanes * place)
            k.store(most[index], tails[index])
            k.store(k.fma(k.load(F32, tails[index] + 4), factors[index], totals[index]), tails[index] + 4)
            k.store(factors[index], self.factors + row * 4)

    def _sees(self, seen: Value, first_token: Value) -> list[Value]:
        """For every vector of a block, which tokens a row sees."""
        k = self.k
        first = first_token.truncate(I32)
        begin, end = (k.splat(k.load(I32, seen + at) - first) for at in (0, 4))
        tokens = [k.table(I32, range(lane, lane + k.lanes)) for lane in range(0, BLOCK_TOKENS, k.lanes)]
        return [(token >= begin) & (token < end) for token in tokens]

    def _score_at(self, line: Value, index: int) -> Value:
        k = self.k
        score = k.load(k.floats, line + 4 * k.lanes * index)
        if not self.shape.capped:
            return score
        cap = k.splat(self.cap)
        return tanh(k, score / cap) * cap

    def _gather(self, states: Value, values: Value, block: Value) -> None:
        """Adds a block of values, weighted, to the states."""
        k, reader = self.k, self.values
        terms = k.minimum(self.end_seen - block * BLOCK_TOKENS, k.int64(BLOCK_TOKENS))
        codes_bytes = reader.kind.value_codes_bytes(reader.length)
        self.products.prefetch_scales(values, range(codes_bytes, reader.block_bytes, LINE_BYTES), reader.block_bytes)
        for count, row in self._row_groups():
            with row as first:
                weights = self.scores + first * (4 * LINE_FLOATS)
                if reader.kind.is_coded:
                    self.products.scale_weights(values, weights, count)
                kept = [k.load_splat(F32, self.factors + (first + index) * 4) for index in range(count)]
                state = states + first * self.state_bytes
                for dims in _groups(list(range(0, self.shape.padded, k.lanes)), self._vectors_at_once(count)):
                    places = (state, kept, values, weights)
                    self.products.gather(*places, dims=dims, state_bytes=self.state_bytes, terms=terms)

    def _vectors_at_once(self, rows: int) -> int:
        """So many that sums, factors and vectors fit the registers."""
        return 4 if self.k.lanes == 16 or rows < 4 else 2

    def _row_groups(self) -> list[tuple[int, AbstractContextManager[Value]]]:
        """All rows, four at a time, then two, then one."""
        k = self.k
        whole = self.rows & -ROWS_AT_ONCE
        pairs = self.rows & -2
        return [
            (ROWS_AT_ONCE, k.loop(0, whole, ROWS_AT_ONCE)),
            (2, k.loop(whole, pairs, 2)),
            (1, k.loop(pairs, self.rows)),
        ]


def _groups(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
