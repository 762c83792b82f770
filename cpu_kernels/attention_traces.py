"""The attention kernels themselves, written over `simd`; `attention` says what they compute and makes rows of them.

What they are made of is in `attention_tile` and `attention_state`.
"""

from cpu_kernels.attention_state import Shape, clear_state, finish_state, merge_state, state_floats, tell_state
from cpu_kernels.attention_tile import TILE_ROWS, Tile
from cpu_kernels.kv_layout import PIECE_TOKENS
from cpu_kernels.simd import Kernel, Value


def trace_whole(k: Kernel, *, shape: Shape, is_part: bool = False) -> None:
    """Items: KV heads, tile after tile. Arguments 9-13: out, its stride, tokens, start, tokens a tile; of a part 14:
    the pieces that it has.
    """
    tile = Tile(k, shape, prefetch=False)
    out, out_stride, tokens, start, per_tile = (k.arg(index) for index in range(9, 14))
    totals, states = (k.scratch(TILE_ROWS * tile.state_bytes) for _ in range(2))
    tiles = (tokens + per_tile - 1) // per_tile
    with k.loop(k.begin, k.end) as item:
        kv_head, first = item // tiles, item % tiles * per_tile
        tile.begin(kv_head, first, k.minimum(per_tile, tokens - first), start)
        tile.fresh(totals)
        pieces = _pieces(tile)
        if is_part:
            pieces = k.minimum(pieces, k.arg(14))
        _gather(k, tile, totals, states, tile.first_seen // PIECE_TOKENS, pieces)
        _put_rows(k, tile, out + first * out_stride, out_stride, totals, is_part=is_part)


def trace_range(k: Kernel, *, shape: Shape, is_part: bool = False) -> None:
    """Items as of `trace_whole`. Arguments 9-15: out, or 0 where pieces are left; its stride; tokens; start; where the
    tiles' states lie between ranges; the first piece and the one behind the last.
    """
    tile = Tile(k, shape, prefetch=False)
    out, out_stride, tokens, start, carried, first_piece, end_piece = (k.arg(index) for index in range(9, 16))
    states = k.scratch(TILE_ROWS * tile.state_bytes)
    per_tile = k.int64(TILE_ROWS) // tile.group
    tiles = (tokens + per_tile - 1) // per_tile
    with k.loop(k.begin, k.end) as item:
        kv_head, first = item // tiles, item % tiles * per_tile
        totals = carried + item * (TILE_ROWS * tile.state_bytes)
        tile.begin(kv_head, first, k.minimum(per_tile, tokens - first), start)
        with k.when(first_piece < 1):
            tile.fresh(totals)
        begin = k.maximum(tile.first_seen // PIECE_TOKENS, first_piece)
        _gather(k, tile, totals, states, begin, k.minimum(_pieces(tile), end_piece))
        with k.when(out > 0):
            _put_rows(k, tile, out + first * out_stride, out_stride, totals, is_part=is_part)


def trace_piece(k: Kernel, *, shape: Shape) -> None:
    """Items: pieces, KV head after KV head, as they lie in memory. Arguments 9-12: scratch, tokens, start, the piece of
    the first item.
    """
    tile = Tile(k, shape, prefetch=True)
    scratch, tokens, start = k.arg(9), k.arg(10), k.arg(11)
    before = k.arg(12) * tile.kv_heads
    with k.loop(k.begin + before, k.end + before) as item:
        tile.begin(item % tile.kv_heads, k.int64(0), tokens, start)
        states = scratch + item * tile.rows * tile.state_bytes
        tile.fresh(states)
        tile.piece(states, item // tile.kv_heads)


def trace_merge(k: Kernel, *, shape: Shape, is_part: bool = False) -> None:
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
        _put(k, out + token * out_stride, head, heads, state, shape, is_part=is_part)


def _pieces(tile: Tile) -> Value:
    """The pieces that a tile sees, and all before them."""
    return (tile.end_seen + (PIECE_TOKENS - 1)) // PIECE_TOKENS


def _gather(k: Kernel, tile: Tile, totals: Value, states: Value, first: Value, end: Value) -> None:
    """Adds pieces to a tile's totals, each by fresh `states`."""
    with k.loop(first, end) as piece:
        tile.fresh(states)
        tile.piece(states, piece)
        with k.loop(0, tile.rows) as row:
            merge_state(k, totals + row * tile.state_bytes, states + row * tile.state_bytes, tile.shape)


def _put_rows(k: Kernel, tile: Tile, out: Value, out_stride: Value, totals: Value, *, is_part: bool) -> None:
    """Writes a tile's results; `out`: of its first token."""
    with k.loop(0, tile.rows) as row:
        place = out + row // tile.group * out_stride
        head, heads = tile.kv_head * tile.group + row % tile.group, tile.kv_heads * tile.group
        _put(k, place, head, heads, totals + row * tile.state_bytes, tile.shape, is_part=is_part)


def _put(k: Kernel, out: Value, head: Value, heads: Value, state: Value, shape: Shape, *, is_part: bool) -> None:
    """Writes a head's result to a token's row; of a part its marks too, behind all heads' results."""
    place = out + head * (4 * shape.value_length)
    if is_part:
        tell_state(k, place, out + heads * (4 * shape.value_length) + head * 4, heads * 4, state, shape)
    else:
        finish_state(k, place, state, shape)
