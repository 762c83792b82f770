"""Attention of a sequence's newest tokens over its KV cache: causal, grouped queries, sliding window, softcap.

Online softmax over blocks of 64 tokens (Milakov and Gimelshein, arXiv:1805.02867), begun anew in every piece of 512
tokens; pieces are merged in rising order. Blocks and pieces lie at fixed positions and every sum is one chain in the
order of the terms, so a query's result is the same, bit for bit, however many queries or threads work beside it, and
whether one thread goes through all pieces (`row`, for prompts) or pieces are shared out and merged by a second row
(`split_rows`, for few queries and long contexts). While some pieces are not there yet, others may be gone through by
rows of their own: a `range_row` goes on from the states that the one before it has left, a `pieces_row` leaves one for
each piece, in any order, until a `merge_row` merges them.

Of a *part*, the first pieces of a context, also what it weighs is told, so that it can be added to the rest, which is
elsewhere: behind the heads' results of a row the greatest score of each head, then each sum of exp(score - greatest).

K and V are read once in order for all query heads of a KV head (`kv_layout`). Queries must be rotated already. Knows
nothing about models. A tile is a group of queries: at most 32 rows, a row being one query head of one token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from cpu_kernels.attention_state import Shape, state_floats
from cpu_kernels.attention_tile import NO_WINDOW, TILE_ROWS
from cpu_kernels.attention_traces import trace_merge, trace_piece, trace_range, trace_whole
from cpu_kernels.isa import ISA
from cpu_kernels.kv_layout import PIECE_BLOCKS, KVLayout, KVMemory, pieces_of
from cpu_kernels.matrix import AnyMatrix
from cpu_kernels.native import float_bits
from cpu_kernels.program import Field, Row, divided, less, times
from cpu_kernels.simd import Kernel
from cpu_kernels.traced import TracedOperation

MARKS = 2  # numbers a head that are told of a part beside its result
NO_END = 1 << 40  # a piece behind all others


def tile_tokens(heads: int, kv_heads: int) -> int:
    """How many tokens a tile holds: the most that `pieces_row` takes. ValueError for an unequal grouping."""
    if heads % kv_heads or heads // kv_heads > TILE_ROWS:
        raise ValueError(f"attention: {heads} heads share {kv_heads} KV heads (groups of at most {TILE_ROWS})")
    return TILE_ROWS // (heads // kv_heads)


def partial_floats(heads: int, layout: KVLayout, tokens: int) -> int:
    """Float32 numbers of scratch that `pieces_row` needs for `tokens` queries at the layout's capacity."""
    return heads * tokens * pieces_of(layout.capacity_tokens) * state_floats(layout.value_length)


def carried_floats(heads: int, layout: KVLayout, tokens: int) -> int:
    """Float32 numbers that `range_row` needs between rows for up to `tokens` queries."""
    tiles = -(-tokens // tile_tokens(heads, layout.kv_heads))
    return layout.kv_heads * tiles * TILE_ROWS * state_floats(layout.value_length)


def part_columns(heads: int, value_length: int) -> int:
    """Columns of what is told of a part."""
    return heads * (value_length + MARKS)


@dataclass(frozen=True, slots=True)
class Attention:
    """out (tokens, heads * value_length) for queries (tokens, heads * key_length) at positions `start` and up, as rows.

    The cache holds start + tokens tokens. `window`: a token sees itself and the window - 1 before it. `chosen`: the
    address of each token's blocks (`kv_select`); None reads all. `part_pieces`: of a part, whose out has
    `part_columns`; None: the whole. ValueError for shapes that do not belong together, or a window below 1.
    """

    out: AnyMatrix
    queries: AnyMatrix
    memory: KVMemory
    tokens: Field
    start: Field
    scale: float
    window: int | None = None
    softcap: float | None = None
    chosen: int | None = None
    part_pieces: Field | None = None
    isa: ISA | None = None

    def __post_init__(self) -> None:
        queries, out, layout = self.queries.columns, self.out.columns, self.memory.layout
        told = layout.value_length + (0 if self.part_pieces is None else MARKS)
        if queries % layout.key_length or out != self._heads * told:
            raise ValueError(f"attention: {queries} query and {out} output columns for {layout}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention with a window of {self.window} tokens")
        tile_tokens(self._heads, layout.kv_heads)

    def row(self) -> Row:
        """In one row, for many tokens: an item is one tile of one KV head. Of a part nothing is chosen."""
        last = self._choice() if self.part_pieces is None else (self.part_pieces, 0)
        per_tile = tile_tokens(self._heads, self.memory.layout.kv_heads)
        out = (self.out.address, self.out.stride_bytes)
        args = (*self._fixed, *out, self.tokens, self.start, per_tile, *last)
        return Row("attention", self._operation("whole", tells=True), self._tiles, args)

    def range_row(self, carried: int, first: int, end: int | None) -> Row:
        """`row` over pieces from `first` to `end` - 1 alone: of rows in rising order that begin at piece 0 and follow
        each other without a gap. The last one's `end` is None: it writes out. Nothing is chosen.

        `carried`: the address of `carried_floats` numbers, which hold the tiles' states from row to row.
        """
        if end is None:
            out, last = (self.out.address, self.out.stride_bytes), self.part_pieces
        else:
            out, last = (0, 0), end
        args = (*self._fixed, *out, self.tokens, self.start, carried, first, NO_END if last is None else last)
        return Row("attention_range", self._operation("range", tells=True), self._tiles, args)

    def pieces_row(self, scratch: int, first: int, end: Field) -> Row:
        """Leaves what each of the pieces from `first` to `end` - 1 says in `scratch`, for at most `tile_tokens` tokens.

        `scratch`: the address of `partial_floats` numbers.
        """
        most = tile_tokens(self._heads, self.memory.layout.kv_heads)
        if isinstance(self.tokens, int) and self.tokens > most:
            raise ValueError(f"attention of {self.tokens} tokens by pieces; a tile holds {most}")
        args = (*self._fixed, scratch, self.tokens, self.start, first, 0, *self._choice())
        items = times(less(end, first), self.memory.layout.kv_heads)
        return Row("attention_pieces", self._operation("piece"), items, args)

    def merge_row(self, scratch: int, pieces: Field) -> Row:
        """Merges what `pieces_row` has left of all pieces that are seen; there are so many, of a part its own."""
        window = NO_WINDOW if self.window is None else self.window
        heads = (self._heads, self.memory.layout.kv_heads)
        out = (self.out.address, self.out.stride_bytes)
        args = (*out, scratch, *heads, pieces, self.start, self.tokens, window)
        return Row("attention_merge", self._operation("merge", tells=True), times(self.tokens, self._heads), args)

    def split_rows(self, scratch: int, pieces: Field) -> tuple[Row, Row]:
        """What `row` does for at most `tile_tokens` tokens: pieces are shared out, then merged."""
        return self.pieces_row(scratch, 0, pieces), self.merge_row(scratch, pieces)

    @property
    def _heads(self) -> int:
        return self.queries.columns // self.memory.layout.key_length

    @property
    def _tiles(self) -> Field:
        kv_heads = self.memory.layout.kv_heads
        return times(divided(self.tokens, tile_tokens(self._heads, kv_heads)), kv_heads)

    @property
    def _fixed(self) -> tuple[Field, ...]:
        """Arguments 0-8 of all but "merge"."""
        kv_heads, window = self.memory.layout.kv_heads, NO_WINDOW if self.window is None else self.window
        return (
            *(self.queries.address, self.queries.stride_bytes, self.memory.table, self.memory.window),
            *(kv_heads, self._heads // kv_heads),
            *(float_bits(self.scale), window, float_bits(self.softcap or 0.0)),
        )

    def _choice(self) -> tuple[Field, Field]:
        """Arguments 14 and 15 of "whole" and "piece"."""
        return (0, 0) if self.chosen is None else (self.chosen, self.memory.layout.pieces * PIECE_BLOCKS)

    def _operation(self, name: str, *, tells: bool = False) -> int:
        """`tells`: it writes what is told of a part."""
        chooses = self.chosen is not None and name in ("whole", "piece")
        shape = Shape.of(self.memory.layout, capped=self.softcap is not None, chooses=chooses)
        is_part = tells and self.part_pieces is not None
        return _operation(f"{name}_part" if is_part else name, shape).address_for(self.isa)


@cache
def _operation(part: str, shape: Shape) -> TracedOperation:
    traces: dict[str, Callable[[Kernel], None]] = {
        "whole": partial(trace_whole, shape=shape),
        "whole_part": partial(trace_whole, shape=shape, is_part=True),
        "range": partial(trace_range, shape=shape),
        "range_part": partial(trace_range, shape=shape, is_part=True),
        "piece": partial(trace_piece, shape=shape),
        "merge": partial(trace_merge, shape=shape),
        "merge_part": partial(trace_merge, shape=shape, is_part=True),
    }
    return TracedOperation(f"attention_{part}_{shape.name}", traces[part])
