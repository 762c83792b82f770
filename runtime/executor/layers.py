"""The steps of a transformer as plain float32 torch functions: norm, rotary positions, attention, gate, expert choice.

Knows nothing about models' descriptions, weights' storage or caches. All functions are pure; shapes are given in each.
"""

import math

import torch

SCORES_IN_MEMORY = 1 << 24  # attention scores at a time: 64 MiB
SMALLEST_WEIGHT_SUM = 2.0**-14  # the least number that float16 holds without loss of precision


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, arXiv:1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (2i, 2i+1) of x (tokens, heads, length) by angles given as (tokens, 1, pairs)."""
    rotated = 2 * cos.shape[-1]
    first, second = x[..., 0:rotated:2], x[..., 1:rotated:2]
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, pairs + i) of x (tokens, heads, length) by angles given as (tokens, 1, pairs)."""
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1)


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence over all of it: (tokens, heads, value length).

    queries (tokens, heads, key length) float32, keys (KV heads, all tokens, key length) and values (KV heads, all
    tokens, value length) of any type; heads h * g to (h + 1) * g - 1 share KV head h. `window`: a token sees itself
    and the window - 1 before it. Queries are taken in blocks, so that scores stay below `SCORES_IN_MEMORY`.
    """
    tokens, heads, _ = queries.shape
    total = keys.shape[1]
    block = max(1, SCORES_IN_MEMORY // (heads * total))
    parts = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        first_seen = 0 if window is None else max(0, total - tokens + start - window + 1)
        last_seen = total - tokens + stop
        parts.append(
            _attend(
                queries[start:stop] * scale,
                keys[:, first_seen:last_seen].float(),
                values[:, first_seen:last_seen].float(),
                window,
                softcap,
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """One block: the last query is at the last key."""
    tokens, heads, length = queries.shape
    kv_heads, seen, _ = keys.shape
    group = heads // kv_heads
    grouped = queries.reshape(tokens, kv_heads, group, length).permute(1, 2, 0, 3)  # (kv_heads, group, tokens, length)
    scores = grouped.reshape(kv_heads, group * tokens, length) @ keys.transpose(1, 2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if tokens > 1:
        behind = torch.arange(seen - tokens, seen, device=keys.device)[:, None] - torch.arange(seen, device=keys.device)
        hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
        scores = scores.view(kv_heads, group, tokens, seen).masked_fill(hidden, -math.inf)
        scores = scores.view(kv_heads, group * tokens, seen)
    mixed = torch.softmax(scores, dim=-1) @ values
    return mixed.view(kv_heads, group, tokens, -1).permute(2, 0, 1, 3).reshape(tokens, heads, -1)


def choose_experts(
    router_logits: torch.Tensor, used: int, *, norm: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_ids, topk_weights), both (tokens, used), from router_logits (tokens, experts); see `Experts`."""
    topk_weights, topk_ids = torch.softmax(router_logits, dim=-1).topk(used, dim=-1)
    if norm:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True).clamp_min(SMALLEST_WEIGHT_SUM)
    return topk_ids, topk_weights * scale
