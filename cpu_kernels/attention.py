"""Attention of a sequence's newest tokens over its KV cache: causal, grouped queries, sliding window, softcap.

Online softmax over blocks of 64 tokens (Milakov and Gimelshein, arXiv:1805.02867), begun anew in every piece of 512
tokens; pieces are merged in rising order. Blocks and pieces lie at fixed positions and every sum is one chain in the
order of the terms, so a query's result is the same, bit for bit, however many queries or threads work beside it, and
whether one thread goes through all pieces (`attention_row`, for prompts) or pieces are shared out and merged by a
second row (`split_attention_rows`, for few queries and long contexts).

Of a *part*, the first pieces of a context, also what it weighs is told, so that it can be added to the rest, which is
elsewhere: behind the heads' results of a row the greatest score of each head, then each sum of exp(score - greatest).

K and V are read once in order for all query heads of a KV head (`kv_layout`). Queries must be rotated already. Knows
nothing about models. A tile is a group of queries: at most 32 rows, a row being one query head of one token.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from cpu_kernels.attention_state import Shape, state_floats
from cpu_kernels.attention_tile import NO_WINDOW, TILE_ROWS
from cpu_kernels.attention_traces import trace_merge, trace_piece, trace_whole
from cpu_kernels.isa import ISA
from cpu_kernels.kv_layout import PIECE_BLOCKS, KVLayout, KVMemory, pieces_of
from cpu_kernels.matrix import AnyMatrix
from cpu_kernels.native import float_bits
from cpu_kernels.program import Field, Row, divided, times
from cpu_kernels.simd import Kernel
from cpu_kernels.traced import TracedOperation

MARKS = 2  # numbers a head that are told of a part beside its result


def tile_tokens(heads: int, kv_heads: int) -> int:
    """How many tokens a tile holds: the most that `split_attention_rows` takes. ValueError for an unequal grouping."""
    if heads % kv_heads or heads // kv_heads > TILE_ROWS:
        raise ValueError(f"attention: {heads} heads share {kv_heads} KV heads (groups of at most {TILE_ROWS})")
    return TILE_ROWS // (heads // kv_heads)


def partial_floats(heads: int, layout: KVLayout, tokens: int) -> int:
    """Float32 numbers of scratch that `split_attention_rows` needs for `tokens` queries at the layout's capacity."""
    return heads * tokens * pieces_of(layout.capacity_tokens) * state_floats(layout.value_length)


def part_columns(heads: int, value_length: int) -> int:
    """Columns of what is told of a part."""
    return heads * (value_length + MARKS)


def attention_row(
    out: AnyMatrix,
    queries: AnyMatrix,
    memory: KVMemory,
    *,
    tokens: Field,
    start: Field,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chosen: int | None = None,
    part_pieces: Field | None = None,
    isa: ISA | None = None,
) -> Row:
    """out (tokens, heads * value_length) for queries (tokens, heads * key_length) at positions `start` and up.

    `window`: a token sees itself and the window - 1 before it. The cache holds start + tokens tokens. For many tokens:
    an item is one tile of one KV head. `chosen`: the address of each token's blocks (`kv_select`); None reads all.
    `part_pieces`: of a part, whose out has `part_columns`, nothing being chosen; None: the whole.
    """
    layout, is_part = memory.layout, part_pieces is not None
    heads = _heads(out, queries, layout, is_part=is_part)
    fixed = _fixed_arguments(queries, memory, heads, scale=scale, window=window, softcap=softcap)
    per_tile = tile_tokens(heads, layout.kv_heads)
    items = times(divided(tokens, per_tile), layout.kv_heads)
    shape = Shape.of(layout, capped=softcap is not None, chooses=chosen is not None)
    operation = _operation("whole_part" if is_part else "whole", shape)
    last = _choice(layout, chosen) if part_pieces is None else (part_pieces, 0)
    args = (*fixed, out.address, out.stride_bytes, tokens, start, per_tile, *last)
    return Row("attention", operation.address_for(isa), items, args)


def split_attention_rows(
    out: AnyMatrix,
    queries: AnyMatrix,
    memory: KVMemory,
    *,
    scratch: int,
    tokens: Field,
    start: Field,
    pieces: Field,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chosen: int | None = None,
    is_part: bool = False,
    isa: ISA | None = None,
) -> tuple[Row, Row]:
    """The same for at most `tile_tokens` tokens: pieces of the context are shared out, then merged.

    `pieces`: pieces_of(start + tokens), of a part its own; `scratch`: address of `partial_floats` numbers; `chosen` as
    there.
    """
    layout = memory.layout
    heads = _heads(out, queries, layout, is_part=is_part)
    if isinstance(tokens, int) and tokens > tile_tokens(heads, layout.kv_heads):
        raise ValueError(f"split attention of {tokens} tokens; a tile holds {tile_tokens(heads, layout.kv_heads)}")
    fixed = _fixed_arguments(queries, memory, heads, scale=scale, window=window, softcap=softcap)
    shape = Shape.of(layout, capped=softcap is not None, chooses=chosen is not None)
    part = _operation("piece", shape)
    merge = _operation("merge_part" if is_part else "merge", replace(shape, chooses=False))
    window_tokens = NO_WINDOW if window is None else window
    return (
        Row(
            "attention_pieces",
            part.address_for(isa),
            times(pieces, layout.kv_heads),
            (*fixed, scratch, tokens, start, 0, 0, *_choice(layout, chosen)),
        ),
        Row(
            "attention_merge",
            merge.address_for(isa),
            times(tokens, heads),
            (out.address, out.stride_bytes, scratch, heads, layout.kv_heads, pieces, start, tokens, window_tokens),
        ),
    )


def _heads(out: AnyMatrix, queries: AnyMatrix, layout: KVLayout, *, is_part: bool) -> int:
    heads = queries.columns // layout.key_length
    columns = part_columns(heads, layout.value_length) if is_part else heads * layout.value_length
    if queries.columns % layout.key_length or out.columns != columns:
        raise ValueError(f"attention: {queries.columns} query and {out.columns} output columns for {layout}")
    tile_tokens(heads, layout.kv_heads)
    return heads


def _fixed_arguments(
    queries: AnyMatrix,
    memory: KVMemory,
    heads: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Field, ...]:
    """Arguments 0-8 of "whole" and "piece"."""
    if window is not None and window < 1:
        raise ValueError(f"attention with a window of {window} tokens")
    layout = memory.layout
    return (
        *(queries.address, queries.stride_bytes, memory.table, memory.window),
        *(layout.kv_heads, heads // layout.kv_heads),
        *(float_bits(scale), NO_WINDOW if window is None else window, float_bits(softcap or 0.0)),
    )


def _choice(layout: KVLayout, chosen: int | None) -> tuple[Field, Field]:
    """Arguments 14 and 15 of "whole" and "piece"."""
    return (0, 0) if chosen is None else (chosen, layout.pieces * PIECE_BLOCKS)


@cache
def _operation(part: str, shape: Shape) -> TracedOperation:
    traces: dict[str, Callable[[Kernel], None]] = {
        "whole": partial(trace_whole, shape=shape),
        "whole_part": partial(trace_whole, shape=shape, is_part=True),
        "piece": partial(trace_piece, shape=shape),
        "merge": partial(trace_merge, shape=shape),
        "merge_part": partial(trace_merge, shape=shape, is_part=True),
    }
    return TracedOperation(f"attention_{part}_{shape.name}", traces[part])
