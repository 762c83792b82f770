"""The attention kernels themselves, written over `simd`; `attention` says what they compute and makes rows of them.

A state is what a query head has gathered from some tokens: the sum of weighted values (filled up to whole tiles), the
greatest score m, the sum of weights l; weights are exp(score - m). A fresh state has m = NOTHING, l = 0 and sums of 0:
merging it changes no bit of another. The same holds for a block that a row does not see.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from cpu_kernels.kv_layout import BLOCK_TOKENS, HALF_BYTES, PIECE_BLOCKS, PIECE_TOKENS, TILE_DIMS
from cpu_kernels.simd import F32, I16, I32, Kernel, Value, Variable, vector_type
from cpu_kernels.traced import each, exp, spread, tanh

TILE_ROWS = 32
NOTHING = -1e30  # a score below all others, yet finite, so that differences are numbers
NO_WINDOW = 1 << 40


@dataclass(frozen=True, slots=True)
class Shape:
    """What kernels are specialised for."""

    key_length: int
    value_length: int
    capped: bool

    @property
    def padded(self) -> int:
        """Dimensions of a value in whole tiles."""
        return -(-self.value_length // TILE_DIMS) * TILE_DIMS


def state_floats(value_length: int) -> int:
    """Float32 numbers of a state: whole cache lines."""
    return -(-value_length // TILE_DIMS) * TILE_DIMS + 16


class _Tile:
    """The rows of one tile of one KV head: where their queries, scores and states lie, and the code that fills them."""

    def __init__(self, k: Kernel, shape: Shape, *, prefetch: bool) -> None:
        """Reads arguments 0-8 of the operation; the rest is set by `begin`."""
        self.k, self.shape, self.prefetch = k, shape, prefetch
        for index, name in enumerate(("queries", "query_stride", "key_cache", "value_cache", "kv_heads", "group")):
            setattr(self, name, k.arg(index))
        self.key_block_bytes = BLOCK_TOKENS * shape.key_length * HALF_BYTES
        self.value_block_bytes = BLOCK_TOKENS * shape.padded * HALF_BYTES
        self.scale, self.window, self.cap = k.float_arg(6), k.arg(7), k.float_arg(8)
        self.state_bytes = 4 * state_floats(shape.value_length)
        self.query_rows = k.scratch(TILE_ROWS * 4 * shape.key_length)
        self.scores = k.scratch(TILE_ROWS * 4 * BLOCK_TOKENS)
        self.factors = k.scratch(TILE_ROWS * 4)
        self.seen = k.scratch(TILE_ROWS * 8)  # int32 pairs: the first position a row sees, the first it does not

    queries: Value
    query_stride: Value
    key_cache: Value
    value_cache: Value
    kv_heads: Value
    group: Value

    def begin(self, kv_head: Value, first_token: Value, tokens: Value, start: Value) -> None:
        """Takes the rows of `tokens` queries from `first_token` on, scaled, and what each sees."""
        k, shape = self.k, self.shape
        self.rows = tokens * self.group
        self.kv_head = kv_head
        first = start + first_token
        self.first_seen = k.maximum(first - self.window + 1, k.int64(0))
        self.end_seen = first + tokens
        with k.loop(0, self.rows) as row:
            token, head = row // self.group, kv_head * self.group + row % self.group
            query = self.queries + (first_token + token) * self.query_stride + head * (4 * shape.key_length)
            to = self.query_rows + row * (4 * shape.key_length)
            each(
                k,
                k.int64(shape.key_length),
                lambda at, kind: k.store(k.load(kind, query + at) * spread(k, self.scale, kind), to + at),
            )
            position = first + token
            k.store(k.maximum(position - self.window + 1, k.int64(0)).truncate(I32), self.seen + row * 8)
            k.store((position + 1).truncate(I32), self.seen + row * 8 + 4)

    def fresh(self, states: Value) -> None:
        """Empties the rows' states."""
        k = self.k
        with k.loop(0, self.rows) as row:
            clear_state(k, states + row * self.state_bytes, self.shape)

    def piece(self, states: Value, piece: Value) -> None:
        """Gathers from the tokens of one piece that some row sees."""
        k = self.k
        first = k.maximum(piece * PIECE_BLOCKS, self.first_seen // BLOCK_TOKENS)
        last = k.minimum((piece + 1) * PIECE_BLOCKS, (self.end_seen + (BLOCK_TOKENS - 1)) // BLOCK_TOKENS)
        # where the head's blocks would begin if all before the piece were its own
        before = (piece * (self.kv_heads - 1) + self.kv_head) * PIECE_BLOCKS
        self.keys = self.key_cache + before * self.key_block_bytes
        self.values = self.value_cache + before * self.value_block_bytes
        with k.loop(first, last) as block:
            self._score(block)
            for count, row in self._row_groups():
                with row as first:
                    self._weigh(states, [first + index for index in range(count)], block * BLOCK_TOKENS)
            self._gather(states, block)

    def _score(self, block: Value) -> None:
        k, length = self.k, self.shape.key_length
        keys = self.keys + block * self.key_block_bytes
        offsets = [HALF_BYTES * first for first in range(0, BLOCK_TOKENS, k.lanes)]
        for count, row in self._row_groups():
            with row as first:
                for group in _groups(offsets, self._vectors_at_once(count)):
                    sums = [[k.variable(k.constant(k.floats, 0.0)) for _ in group] for _ in range(count)]
                    queries = self.query_rows + first * (4 * length)
                    ahead = self.key_block_bytes if self.prefetch and group[0] == 0 else 0
                    self._multiply(
                        sums,
                        (queries, 4 * length),
                        (keys, HALF_BYTES * BLOCK_TOKENS),
                        group,
                        terms=k.int64(length),
                        ahead=ahead,
                    )
                    self._store(
                        sums, self.scores + first * (4 * BLOCK_TOKENS), 4 * BLOCK_TOKENS, [2 * o for o in group]
                    )

    def _weigh(self, states: Value, rows: list[Value], first_token: Value) -> None:
        """Scores become weights; a state's m and l follow, and the factor for what was gathered before.

        Several rows go in step: one row alone waits for its own sums and exponentials.
        """
        k = self.k
        lines = [self.scores + row * (4 * BLOCK_TOKENS) for row in rows]
        tails = [states + row * self.state_bytes + 4 * self.shape.padded for row in rows]
        sees = [self._sees(row, first_token) for row in rows]
        nothing, none = k.constant(k.floats, NOTHING), k.constant(k.floats, 0.0)
        scores = [
            [k.select(seen, self._score_at(line, index), nothing) for index, seen in enumerate(row)]
            for line, row in zip(lines, sees, strict=True)
        ]
        before = [k.load(F32, tail) for tail in tails]
        most = [k.maximum(k.max_lanes(_folded(row, k.maximum)), old) for row, old in zip(scores, before, strict=True)]
        factors = [exp(k, old - new) for old, new in zip(before, most, strict=True)]
        weights = [
            [k.select(seen, exp(k, score - k.splat(new)), none) for score, seen in zip(row, row_sees, strict=True)]
            for row, row_sees, new in zip(scores, sees, most, strict=True)
        ]
        totals = [k.sum_lanes(_folded(row, lambda left, right: left + right)) for row in weights]
        for index, row in enumerate(rows):
            for place, weight in enumerate(weights[index]):
                k.store(weight, lines[index] + 4 * k.lanes * place)
            k.store(most[index], tails[index])
            k.store(k.fma(k.load(F32, tails[index] + 4), factors[index], totals[index]), tails[index] + 4)
            k.store(factors[index], self.factors + row * 4)

    def _sees(self, row: Value, first_token: Value) -> list[Value]:
        """For every vector of a block, which tokens the row sees."""
        k = self.k
        first = first_token.truncate(I32)
        begin, end = (k.splat(k.load(I32, self.seen + row * 8 + at) - first) for at in (0, 4))
        tokens = [k.table(I32, range(lane, lane + k.lanes)) for lane in range(0, BLOCK_TOKENS, k.lanes)]
        return [(token >= begin) & (token < end) for token in tokens]

    def _score_at(self, line: Value, index: int) -> Value:
        k = self.k
        score = k.load(k.floats, line + 4 * k.lanes * index)
        if not self.shape.capped:
            return score
        cap = k.splat(self.cap)
        return tanh(k, score / cap) * cap

    def _gather(self, states: Value, block: Value) -> None:
        k = self.k
        values = self.values + block * self.value_block_bytes
        terms = k.minimum(self.end_seen - block * BLOCK_TOKENS, k.int64(BLOCK_TOKENS))
        tile_bytes = BLOCK_TOKENS * TILE_DIMS * HALF_BYTES
        dims = list(range(0, self.shape.padded, k.lanes))
        for count, row in self._row_groups():
            with row as first:
                state = states + first * self.state_bytes
                for group in _groups(dims, self._vectors_at_once(count)):
                    sums = []
                    for index in range(count):
                        factor = k.load_splat(F32, self.factors + (first + index) * 4)
                        place = state + index * self.state_bytes
                        sums.append([k.variable(k.load(k.floats, place + 4 * dim) * factor) for dim in group])
                    offsets = [dim // TILE_DIMS * tile_bytes + dim % TILE_DIMS * HALF_BYTES for dim in group]
                    weights = self.scores + first * (4 * BLOCK_TOKENS)
                    ahead = self.value_block_bytes if self.prefetch else 0
                    self._multiply(
                        sums,
                        (weights, 4 * BLOCK_TOKENS),
                        (values, HALF_BYTES * TILE_DIMS),
                        offsets,
                        terms=terms,
                        ahead=ahead,
                    )
                    self._store(sums, state, self.state_bytes, [4 * dim for dim in group])

    def _multiply(
        self,
        sums: list[list[Variable]],
        factors: tuple[Value, int],
        matrix: tuple[Value, int],
        offsets: list[int],
        *,
        terms: Value,
        ahead: int,
    ) -> None:
        """sums[r][v] += factors[r, t] * vector v of term t, one chain of t each.

        `factors`: address and bytes from row to row; `matrix`: address and bytes from term to term; `ahead`: how far
        to prefetch, or 0.
        """
        k = self.k
        (first_factor, factor_stride), (first_term, term_bytes) = factors, matrix
        halves = vector_type(I16, k.lanes)
        lines = sorted({offset // 64 for offset in offsets})
        with k.loop(0, terms) as term:
            place = first_term + term * term_bytes
            if ahead:
                for line in lines:
                    k.prefetch(place + (ahead + 64 * line))
            vectors = [k.half_to_float(k.load(halves, place + offset)) for offset in offsets]
            for row, chain in enumerate(sums):
                factor = k.load_splat(F32, first_factor + term * 4 + row * factor_stride)
                for vector, total in zip(vectors, chain, strict=True):
                    total.set(k.fma(vector, factor, total.get()))

    def _store(self, sums: list[list[Variable]], to: Value, stride: int, offsets: list[int]) -> None:
        for row, chain in enumerate(sums):
            for offset, total in zip(offsets, chain, strict=True):
                self.k.store(total.get(), to + (row * stride + offset))

    def _vectors_at_once(self, rows: int) -> int:
        """So many that sums, factors and vectors fit the registers."""
        return 4 if self.k.lanes == 16 or rows < 4 else 2

    def _row_groups(self) -> list[tuple[int, AbstractContextManager[Value]]]:
        """All rows, four at a time, then two, then one."""
        k = self.k
        whole = self.rows & -4
        pairs = self.rows & -2
        return [(4, k.loop(0, whole, 4)), (2, k.loop(whole, pairs, 2)), (1, k.loop(pairs, self.rows))]


def clear_state(k: Kernel, state: Value, shape: Shape) -> None:
    """A fresh state."""
    for dim in range(0, shape.padded, k.lanes):
        k.store(k.constant(k.floats, 0.0), state + 4 * dim)
    k.store(k.constant(F32, NOTHING), state + 4 * shape.padded)
    k.store(k.constant(F32, 0.0), state + (4 * shape.padded + 4))


def merge_state(k: Kernel, into: Value, state: Value, shape: Shape) -> None:
    """Adds what another state has gathered."""
    at = 4 * shape.padded
    before, other = k.load(F32, into + at), k.load(F32, state + at)
    most = k.maximum(before, other)
    keep, take = exp(k, before - most), exp(k, other - most)
    k.store(most, into + at)
    k.store(k.fma(k.load(F32, state + (at + 4)), take, k.load(F32, into + (at + 4)) * keep), into + (at + 4))
    for dim in range(0, shape.padded, k.lanes):
        kept = k.load(k.floats, into + 4 * dim) * k.splat(keep)
        k.store(k.fma(k.load(k.floats, state + 4 * dim), k.splat(take), kept), into + 4 * dim)


def finish_state(k: Kernel, out: Value, state: Value, shape: Shape) -> None:
    """out = weighted values / sum of weights."""
    total = k.load(F32, state + (4 * shape.padded + 4))
    each(
        k,
        k.int64(shape.value_length),
        lambda at, kind: k.store(k.load(kind, state + at) / spread(k, total, kind), out + at),
    )


def trace_whole(k: Kernel, *, shape: Shape) -> None:
    """Items: KV heads, tile after tile. Arguments 9-13: out, its stride, tokens, start, tokens a tile."""
    tile = _Tile(k, shape, prefetch=False)
    out, out_stride, tokens, start, per_tile = (k.arg(index) for index in range(9, 14))
    totals, states = (k.scratch(TILE_ROWS * tile.state_bytes) for _ in range(2))
    tiles = (tokens + per_tile - 1) // per_tile
    with k.loop(k.begin, k.end) as item:
        kv_head, first = item // tiles, item % tiles * per_tile
        tile.begin(kv_head, first, k.minimum(per_tile, tokens - first), start)
        tile.fresh(totals)
        with k.loop(tile.first_seen // PIECE_TOKENS, (tile.end_seen + (PIECE_TOKENS - 1)) // PIECE_TOKENS) as piece:
            tile.fresh(states)
            tile.piece(states, piece)
            with k.loop(0, tile.rows) as row:
                merge_state(k, totals + row * tile.state_bytes, states + row * tile.state_bytes, shape)
        with k.loop(0, tile.rows) as row:
            head = kv_head * tile.group + row % tile.group
            place = out + (first + row // tile.group) * out_stride + head * (4 * shape.value_length)
            finish_state(k, place, totals + row * tile.state_bytes, shape)


def trace_piece(k: Kernel, *, shape: Shape) -> None:
    """Items: pieces, KV head after KV head, as they lie in memory. Arguments 9-11: scratch, tokens, start."""
    tile = _Tile(k, shape, prefetch=True)
    scratch, tokens, start = k.arg(9), k.arg(10), k.arg(11)
    with k.loop(k.begin, k.end) as item:
        tile.begin(item % tile.kv_heads, k.int64(0), tokens, start)
        states = scratch + item * tile.rows * tile.state_bytes
        tile.fresh(states)
        tile.piece(states, item // tile.kv_heads)


def trace_merge(k: Kernel, *, shape: Shape) -> None:
    """Items: heads, token after token. Arguments: out, stride, scratch, heads, KV heads, pieces, start, tokens,
    window.
    """
    out, out_stride, scratch, heads, kv_heads, pieces, start, tokens, window = (k.arg(index) for index in range(9))
    state_bytes = 4 * state_floats(shape.value_length)
    state = k.scratch(state_bytes)
    group = heads // kv_heads
    rows = tokens * group
    with k.loop(k.begin, k.end) as item:
        token, head = item // heads, item % heads
        row = token * group + head % group
        first_seen = k.maximum(start + token - window + 1, k.int64(0))
        clear_state(k, state, shape)
        with k.loop(first_seen // PIECE_TOKENS, pieces) as piece:
            part = (piece * kv_heads + head // group) * rows + row
            merge_state(k, state, scratch + part * state_bytes, shape)
        finish_state(k, out + token * out_stride + head * (4 * shape.value_length), state, shape)


def _folded(values: list[Value], join: Callable[[Value, Value], Value]) -> Value:
    """Neighbours joined until one is left."""
    while len(values) > 1:
        values = [join(values[index], values[index + 1]) for index in range(0, len(values), 2)]
    return values[0]


def _groups(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
