"""Rotary positions, the append to blocks of keys and values, and attention over them, with torch on any device.

Knows nothing about models. On the CPU lengths are read, so that only what a lane holds is looked at; elsewhere the
whole block table is, and what lies behind a lane's length is hidden.
"""

import math

import torch

from gpu_kernels.blocks import KVBlocks, Lanes, Rotation

_SCORES_AT_ONCE = 1 << 24  # 64 MiB


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


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 (..., length) and scales float32 (...): the greatest magnitude / 127; zeros have the scale 0."""
    scales = x.abs().amax(-1) / 127
    codes = torch.where(scales[..., None] > 0, x / scales[..., None], 0.0)
    return torch.round(codes).to(torch.int8), scales


def append(cache: KVBlocks, lanes: Lanes, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Puts keys and values (tokens, kv_heads, length) float32 where their positions lie."""
    each = lanes.tokens_each(keys.shape[0])
    lane = torch.arange(keys.shape[0], device=keys.device) // each
    block = lanes.table[lane, (positions // cache.block_tokens).long()].long()
    place = (positions % cache.block_tokens).long()
    for store, scales, new in ((cache.keys, cache.key_scales, keys), (cache.values, cache.value_scales, values)):
        if scales is None:
            store[block, place] = new.half()
        else:
            store[block, place], scales[block, place] = quantize(new)


def attend(
    queries: torch.Tensor,
    cache: KVBlocks,
    lanes: Lanes,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """See `Kernels.attention`."""
    each = lanes.tokens_each(queries.shape[0])
    for lane in range(lanes.count):
        blocks = lanes.table[lane]
        length = lanes.lengths[lane]
        if queries.device.type == "cpu":
            blocks = blocks[: -(-int(length) // cache.block_tokens)]
        keys = _held(cache.keys, cache.key_scales, blocks)
        values = _held(cache.values, cache.value_scales, blocks)
        behind = torch.arange(keys.shape[1], device=keys.device) >= length
        values = values.masked_fill(behind[None, :, None], 0.0)  # unused memory may hold NaN, and 0 * NaN is NaN
        rows = queries[lane * each : (lane + 1) * each].view(each, -1, cache.key_length).float()
        step = max(1, _SCORES_AT_ONCE // (rows.shape[1] * keys.shape[1]))
        for first in range(0, each, step):
            part = rows[first : first + step] * scale
            position = length - each + torch.arange(first, first + len(part), device=keys.device)
            mixed = _attend(part, keys, values, position, window, softcap)
            out[lane * each + first : lane * each + first + len(part)] = mixed.flatten(1)


def _held(store: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor) -> torch.Tensor:
    """The numbers of a lane's blocks: (kv_heads, tokens, length) float32."""
    held = store[blocks.long()].float()
    if scales is not None:
        held = held * scales[blocks.long()][..., None]
    return held.flatten(0, 1).transpose(0, 1)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Queries (n, heads, length), scaled, of tokens at `position` (n,), to (n, heads, value_length)."""
    tokens, heads, length = queries.shape
    kv_heads, seen, _ = keys.shape
    grouped = queries.view(tokens, kv_heads, -1, length).transpose(0, 1).reshape(kv_heads, -1, length)
    scores = grouped @ keys.transpose(1, 2)  # (kv_heads, tokens * group, seen)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    behind = position[:, None] - torch.arange(seen, device=keys.device)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    scores = scores.view(kv_heads, tokens, -1, seen).masked_fill(hidden[:, None], -math.inf)
    mixed = torch.softmax(scores, dim=-1).flatten(1, 2) @ values
    return mixed.view(kv_heads, tokens, -1, values.shape[-1]).transpose(0, 1).reshape(tokens, heads, -1)
