"""One tile of attention as a part of kernels: rows of queries that go together over the blocks of one KV head.

Keys of coded types with a window are gone through twice, each row seeing other tokens: full blocks before its own as
codes, then its own block in float16. What a row sees of either depends on its position alone, and on the blocks that
were chosen for its token (`kv_select`) where some are; a block that was chosen for none of a tile's is not touched.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from cpu_kernels.attention_codes import CodedKeys, CodedValues
from cpu_kernels.attention_products import LINE_FLOATS, ROWS_AT_ONCE, FloatKeys, FloatValues, Rows, folded
from cpu_kernels.attention_state import NOTHING, Shape, clear_state, state_floats
from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS
from cpu_kernels.kv_read import KeyReader
from cpu_kernels.kv_types import KVType
from cpu_kernels.simd import F32, I8, I32, I64, Kernel, Value
from cpu_kernels.traced import each, exp, spread, tanh

TILE_ROWS = 32
NO_WINDOW = 1 << 40


@dataclass(frozen=True, slots=True)
class Pass:
    """Blocks that are gone through: how keys are read, where the head's would begin if all before the piece were its
    own, which tokens a row sees, the blocks.
    """

    reader: KeyReader
    keys: Value
    seen: Value  # int32 pairs: the first position a row sees, the first it does not
    first: Value
    last: Value


class Tile:
    """The rows of one tile of one KV head: where their queries, scores and states lie, and the code that fills them."""

    def __init__(self, k: Kernel, shape: Shape, *, prefetch: bool) -> None:
        """Reads arguments 0-8 of the operation, and 14 and 15 where blocks are chosen; `begin` sets the rest."""
        self.k, self.shape, self.prefetch = k, shape, prefetch
        self.queries, self.query_stride, self.table, self.new_keys = (k.arg(index) for index in range(4))
        self.kv_heads, self.group = k.arg(4), k.arg(5)
        self.scale, self.window, self.cap = k.float_arg(6), k.arg(7), k.float_arg(8)
        self.chosen, self.chosen_bytes = k.arg(14), k.arg(15)  # of the choices; bytes of a KV head's
        self.has_window = shape.key_type.has_minimum
        self.window_type = KVType.F16 if self.has_window else shape.key_type
        self.keys = KeyReader(k, shape.key_type, shape.key_length)
        self.scorers = {kind: self._scorer(kind) for kind in dict.fromkeys((shape.key_type, self.window_type))}
        self.gatherer = (CodedValues if shape.value_type.is_coded else FloatValues)(k, shape, prefetch=prefetch)
        self.values = self.gatherer.reader
        self.state_bytes = 4 * state_floats(shape.value_length)
        self.query_rows = Rows(k.scratch(TILE_ROWS * 4 * shape.key_length), 4 * shape.key_length)
        self.scores = Rows(k.scratch(TILE_ROWS * 4 * LINE_FLOATS), 4 * LINE_FLOATS)
        self.factors = k.scratch(TILE_ROWS * 4)
        self.seen = k.scratch(TILE_ROWS * 8)
        self.seen_window = k.scratch(TILE_ROWS * 8) if self.has_window else self.seen

    def begin(self, kv_head: Value, first_token: Value, tokens: Value, start: Value) -> None:
        """Takes the rows of `tokens` queries from `first_token` on, scaled, and what each sees."""
        k, length = self.k, self.shape.key_length
        self.rows = tokens * self.group
        self.kv_head = kv_head
        self.choice = self.chosen + (first_token * self.kv_heads + kv_head) * self.chosen_bytes
        self.first = start + first_token
        self.first_seen = k.maximum(self.first - self.window + 1, k.int64(0))
        self.end_seen = self.first + tokens
        with k.loop(0, self.rows) as row:
            token, head = row // self.group, kv_head * self.group + row % self.group
            query = self.queries + (first_token + token) * self.query_stride + head * (4 * length)
            to = self.query_rows.at(row)
            each(
                k,
                k.int64(length),
                lambda at, kind: k.store(k.load(kind, query + at) * spread(k, self.scale, kind), to + at),
            )
            position = self.first + token
            first, own = k.maximum(position - self.window + 1, k.int64(0)), position // BLOCK_TOKENS * BLOCK_TOKENS
            self._see(self.seen, row, first, own if self.has_window else position + 1)
            if self.has_window:
                self._see(self.seen_window, row, k.maximum(first, own), position + 1)
        for scorer in self.scorers.values():
            scorer.take(self.query_rows, self.rows)

    def _scorer(self, kind: KVType) -> FloatKeys | CodedKeys:
        reader = KeyReader(self.k, kind, self.shape.key_length)
        if kind.is_coded:
            return CodedKeys(self.k, reader, TILE_ROWS, prefetch=self.prefetch)
        return FloatKeys(self.k, reader, prefetch=self.prefetch)

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
        chunk = k.load(I64, self.table + piece * 8)
        before = (self.kv_head - piece) * PIECE_BLOCKS
        keys_bytes = self.kv_heads * (PIECE_BLOCKS * self.keys.block_bytes)
        values = chunk + keys_bytes + before * self.values.block_bytes
        wanted = self._wanted(piece) if self.shape.chooses else None
        for part in self._passes(piece, chunk + before * self.keys.block_bytes):
            with k.loop(part.first, part.last) as block, self._if_wanted(wanted, block):
                self._score(part.reader, part.keys + block * part.reader.block_bytes)
                for count, row in self._row_groups():
                    with row as first:
                        rows = [first + index for index in range(count)]
                        self._weigh(states, rows, block * BLOCK_TOKENS, part.seen)
                self._gather(states, values + block * self.values.block_bytes, block)

    def _wanted(self, piece: Value) -> Value:
        """A byte for each block of a piece: not 0 if it was chosen for some row."""
        k = self.k
        wanted = k.variable(k.int64(0))
        with k.loop(0, self.rows // self.group) as token:
            wanted.set(wanted.get() | k.load(I64, self._choice_of(token) + piece * PIECE_BLOCKS))
        return wanted.get()

    def _if_wanted(self, wanted: Value | None, block: Value) -> AbstractContextManager[None]:
        if wanted is None:
            return nullcontext()
        return self.k.when(((wanted >> (block % PIECE_BLOCKS) * 8) & 1) > 0)

    def _choice_of(self, token: Value) -> Value:
        """Where a token's choice lies."""
        return self.choice + token * (self.kv_heads * self.chosen_bytes)

    def _passes(self, piece: Value, keys: Value) -> list[Pass]:
        k = self.k
        first = k.maximum(piece * PIECE_BLOCKS, self.first_seen // BLOCK_TOKENS)
        last = k.minimum((piece + 1) * PIECE_BLOCKS, (self.end_seen + (BLOCK_TOKENS - 1)) // BLOCK_TOKENS)
        if not self.has_window:
            return [Pass(self.keys, keys, self.seen, first, last)]
        halves = KeyReader(k, KVType.F16, self.shape.key_length)
        full = k.minimum((piece + 1) * PIECE_BLOCKS, (self.end_seen - 1) // BLOCK_TOKENS)
        own = k.maximum(piece * PIECE_BLOCKS, self.first // BLOCK_TOKENS)
        before = (piece * (self.kv_heads - 1) + self.kv_head) * PIECE_BLOCKS
        newest = self.new_keys + before * halves.block_bytes
        return [Pass(self.keys, keys, self.seen, first, full), Pass(halves, newest, self.seen_window, own, last)]

    def _score(self, reader: KeyReader, keys: Value) -> None:
        """Scores of all rows with a block of keys."""
        for count, row in self._row_groups():
            with row as first:
                self.scorers[reader.kind].score(keys, self.query_rows, self.scores, first, count)

    def _weigh(self, states: Value, rows: list[Value], first_token: Value, seen_by: Value) -> None:
        """Scores become weights; a state's m and l follow, and the factor for what was gathered before.

        Several rows go in step: one row alone waits for its own sums and exponentials.
        """
        k = self.k
        lines = [self.scores.at(row) for row in rows]
        tails = [states + row * self.state_bytes + 4 * self.shape.padded for row in rows]
        sees = [self._sees(seen_by, row, first_token) for row in rows]
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

    def _sees(self, seen_by: Value, row: Value, first_token: Value) -> list[Value]:
        """For every vector of a block, which tokens a row sees."""
        k = self.k
        first = first_token.truncate(I32)
        seen = [k.load(I32, seen_by + row * 8 + at) - first for at in (0, 4)]
        if self.shape.chooses:
            chosen = k.load(I8, self._choice_of(row // self.group) + first_token // BLOCK_TOKENS)
            seen[1] = k.select(chosen > 0, seen[1], k.constant(I32, 0))
        begin, end = (k.splat(place) for place in seen)
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
        k = self.k
        terms = k.minimum(self.end_seen - block * BLOCK_TOKENS, k.int64(BLOCK_TOKENS))
        for count, row in self._row_groups():
            with row as first:
                kept = [k.load_splat(F32, self.factors + (first + index) * 4) for index in range(count)]
                to = Rows(states, self.state_bytes)
                self.gatherer.gather(to, kept, values, self.scores, first, terms=terms)

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
