"""Rotary positions, the append to blocks of keys and values, and attention over them, with torch on any device.

Knows nothing about models. On the CPU lengths are read, so that only what a lane holds is looked at; elsewhere the
whole block table is, and what lies behind a lane's length is hidden. What a token gets is the same to the bit whatever
tokens are computed beside it: the context is summed in runs of fixed places (online softmax, arXiv:1805.02867).
"""

import math

import torch

from gpu_kernels import torch_rows
from gpu_kernels.blocks import KVBlocks, KVRows, Lanes, Rotation
from gpu_kernels.row_sums import applied
from gpu_kernels.torch_products import TILE, sums_alike

_RUN_TOKENS = 256


def rotate(x: torch.Tensor, positions: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x (tokens, heads, length) float32, turned by the angles of positions (tokens,)."""
    cos, sin = (table[positions.long()][:, None] for table in (rotation.cos, rotation.sin))
    pairs = rotation.pairs
    rest = x[..., 2 * pairs :]
    if rotation.neighbours:
        low, high = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        turned = torch.stack((low * cos - high * sin, low * sin + high * cos), dim=-1).flatten(-2)
        return torch.cat((turned, rest), dim=-1)
    low, high = x[..., :pairs], x[..., pairs : 2 * pairs]
    return torch.cat((low * cos - high * sin, low * sin + high * cos, rest), dim=-1)


def append(cache: KVBlocks, lanes: Lanes, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Puts keys and values (tokens, kv_heads, length) float32 where their positions lie."""
    each = lanes.tokens_each(keys.shape[0])
    lane = torch.arange(keys.shape[0], device=keys.device) // each
    block = lanes.table[lane, (positions // cache.block_tokens).long()].long()
    place = (positions % cache.block_tokens).long()
    for rows, new in ((cache.keys, keys), (cache.values, values)):
        torch_rows.put(rows, block, place, new)


def attend(
    queries: torch.Tensor,
    cache: KVBlocks,
    lanes: Lanes,
    out: torch.Tensor,
    marks: torch.Tensor | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """See `Kernels.attention`."""
    each = lanes.tokens_each(queries.shape[0])
    for number in range(lanes.count):
        lane = _Lane(cache, lanes.table[number], lanes.lengths[number], window, softcap)
        rows = queries[number * each : (number + 1) * each].view(each, -1, cache.key_length).float() * scale
        target = out[number * each : (number + 1) * each]
        for first in range(0, each, lane.tile_tokens(rows.shape[1])):
            part = slice(first, first + lane.tile_tokens(rows.shape[1]))
            found, greatest, sums = lane.attend(rows[part], first - each)
            if cache.values.is_turned:
                found = torch_rows.turned(found)
            target[part] = found.flatten(1)
            if marks is not None:
                marks[number * each : (number + 1) * each][part] = torch.cat((greatest, sums), dim=1)


def join_parts(out: torch.Tensor, marks: torch.Tensor, part: torch.Tensor) -> None:
    """See `Kernels.join_parts`."""
    tokens, columns = out.shape
    greatest, sums = marks.chunk(2, dim=1)  # (tokens, heads)
    other_greatest, other_sums = part[:, columns:].chunk(2, dim=1)
    peak = torch.maximum(greatest, other_greatest)
    mine = sums * applied(torch.exp, (greatest - peak).contiguous())
    others = other_sums * applied(torch.exp, (other_greatest - peak).contiguous())
    shares = [(weight / (mine + others))[..., None] for weight in (mine, others)]
    heads = [x.reshape(tokens, sums.shape[1], -1) for x in (out.float(), part[:, :columns])]
    out.copy_((heads[0] * shares[0] + heads[1] * shares[1]).flatten(1))


class _Lane:
    """The keys and values of one sequence, looked at in runs of the same tokens whoever asks.

    A tile of query tokens is always of one size, filled up with zeros, so that all products have the shapes that one
    token's have; a run of which a token may see nothing leaves its sums as they are, to the bit.
    """

    def __init__(
        self, cache: KVBlocks, table: torch.Tensor, length: torch.Tensor, window: int | None, softcap: float | None
    ) -> None:
        self._cache, self._table, self._length = cache, table, length
        self._window, self._softcap = window, softcap
        self._run = max(1, _RUN_TOKENS // cache.block_tokens) * cache.block_tokens
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def tile_tokens(self, heads: int) -> int:
        """Query tokens at a time: about 16 rows for each head of keys, or one token where such rows would differ."""
        cache, group = self._cache, heads // self._cache.kv_heads
        tokens = max(1, TILE // group)
        shape = (self._table.device, tokens * group)
        alike = sums_alike(*shape, cache.key_length, self._run, cache.kv_heads)
        return tokens if alike and sums_alike(*shape, self._run, cache.value_length + 1, cache.kv_heads) else 1

    def attend(self, queries: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For queries (n, heads, length), scaled, of tokens at length + first and up: what is attended (n, heads,
        value_length), the greatest scores and the sums of weights, (n, heads).
        """
        tokens, heads, length = queries.shape
        most, kv_heads = self.tile_tokens(heads), self._cache.kv_heads
        tile = torch.zeros((most, heads, length), device=queries.device)
        tile[:tokens] = queries
        grouped = tile.view(most, kv_heads, -1, length).transpose(0, 1).reshape(kv_heads, -1, length)
        position = self._length + first + torch.arange(most, device=queries.device)
        greatest = torch.full((*grouped.shape[:2], 1), -math.inf, device=queries.device)
        mixed = torch.zeros((*grouped.shape[:2], self._cache.value_length + 1), device=queries.device)
        for start in self._starts(first, tokens):
            keys, values = self._read(start)
            scores = grouped @ keys.transpose(1, 2)  # (kv_heads, most * group, run)
            if self._softcap is not None:
                scores = applied(torch.tanh, scores / self._softcap) * self._softcap
            behind = position[:, None] - torch.arange(start, start + self._run, device=queries.device)
            hidden = behind < 0 if self._window is None else (behind < 0) | (behind >= self._window)
            scores = scores.view(kv_heads, most, -1, self._run).masked_fill(hidden[:, None], -math.inf).flatten(1, 2)
            peak = torch.maximum(greatest, scores.amax(-1, keepdim=True))
            safe = torch.where(peak == -math.inf, 0.0, peak)
            shrink = applied(torch.exp, (greatest - safe).flatten()).view(greatest.shape)
            mixed = mixed * shrink + applied(torch.exp, scores - safe).contiguous() @ values.transpose(1, 2)
            greatest = peak
        sums = mixed[..., -1:]  # the last column summed the weights

        def by_token(x: torch.Tensor) -> torch.Tensor:
            return x.view(kv_heads, most, -1, x.shape[-1]).transpose(0, 1).reshape(most, heads, -1)[:tokens]

        return by_token(mixed[..., :-1] / sums), by_token(greatest)[..., 0], by_token(sums)[..., 0]

    def _starts(self, first: int, tokens: int) -> range:
        """Where the runs begin that tokens at length + first and up see something of; on the CPU the length is read."""
        if self._table.device.type != "cpu":
            return range(0, len(self._table) * self._cache.block_tokens, self._run)
        position = int(self._length) + first
        begin = 0 if self._window is None else max(position - self._window + 1, 0)
        return range(begin // self._run * self._run, position + tokens, self._run)

    def _read(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A run's keys (kv_heads, run, length) and, with a row of ones, values (kv_heads, length + 1, run), float32."""
        if start not in self._held:
            cache, there = self._cache, torch.arange(start, start + self._run, device=self._table.device) < self._length
            blocks = self._table[start // cache.block_tokens : (start + self._run) // cache.block_tokens].long()
            keys, values = (self._filled(rows, blocks, there) for rows in (cache.keys, cache.values))
            values = torch.cat((values, torch.ones_like(values[..., :1])), dim=-1).transpose(1, 2)
            self._held[start] = keys.contiguous(), values.contiguous()
        return self._held[start]

    def _filled(self, rows: KVRows, blocks: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Zeros where nothing lies yet: unused memory may hold NaN, and 0 * NaN is NaN."""
        held = torch_rows.read(rows, blocks).flatten(0, 1).transpose(0, 1)  # (kv_heads, tokens, length)
        missing = self._run - held.shape[1]
        if missing:
            held = torch.nn.functional.pad(held, (0, 0, 0, missing))
        return held.masked_fill(~there[None, :, None], 0.0)
