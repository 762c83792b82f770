"""Rows of keys and values on their way into blocks and out of them, with torch on any device.

Rounds as `cpu_kernels.kv_encode` does, to the bit, so that what one device has coded the other can go on with. A group
whose numbers are not all finite gets a scale that is not finite either. Knows nothing about what rows are for.
"""

import torch
from torch.nn import functional

from gpu_kernels.blocks import GROUP, KVRows

_LEAST, _GREATEST, _OFFSET = -8, 7, 8  # codes of 4 bits, and what is added to them
_WIDE = 127  # the greatest code of 8 bits


def turned(x: torch.Tensor) -> torch.Tensor:
    """x (..., length) float32 times the orthogonal Walsh-Hadamard matrix; `length` is a power of two."""
    length, step = x.shape[-1], 1
    while step < length:
        low, high = x.reshape(*x.shape[:-1], -1, 2, step).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        step *= 2
    return x.mul(length**-0.5)


def put(rows: KVRows, block: torch.Tensor, place: torch.Tensor, new: torch.Tensor) -> None:
    """new (tokens, kv_heads, length) float32 go to places of blocks, both (tokens,)."""
    if rows.is_turned:
        new = turned(new)
    if rows.scales is None:
        rows.numbers[block, place] = new.to(rows.numbers.dtype)
    else:
        rows.numbers[block, place], rows.scales[block, place] = _coded(rows, new)


def read(rows: KVRows, blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, block_tokens, kv_heads, length) float32 of some blocks."""
    held = rows.numbers[blocks]
    if rows.scales is None:
        return held.float()
    if rows.kind == "q4_0":
        pairs = held.view(*held.shape[:-1], -1, rows.step // 2)
        held = torch.stack((pairs & 15, pairs >> 4), dim=-2).flatten(-3).to(torch.int8) - _OFFSET
    codes = _in_groups(functional.pad(held[..., : rows.length].float(), (0, -rows.length % GROUP)))
    return (codes * rows.scales[blocks].float()[..., None]).flatten(-2)[..., : rows.length]


def _in_groups(x: torch.Tensor) -> torch.Tensor:
    """(..., groups, 32) of whole groups."""
    return x.reshape(*x.shape[:-1], -1, GROUP)


def _coded(rows: KVRows, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (..., n) as they are kept, and scales (..., groups) float16."""
    is_wide, first = rows.kind == "q8_0", rows.length // GROUP * GROUP
    missing = -rows.length % GROUP
    if missing:
        new = torch.cat((new, new[..., first : first + 1].expand(*new.shape[:-1], missing)), dim=-1)
    groups = _in_groups(new)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = torch.maximum(high, -low) * (1 / _WIDE) if is_wide else torch.where(-low >= high, low, high) * -0.125
    scales = (scale + (groups * 0.0).sum(-1)).half()
    rounded = scales.float()
    factor = torch.where(rounded == 0, 0.0, 1 / rounded)
    bounds = (-_WIDE, _WIDE) if is_wide else (_LEAST, _GREATEST)
    codes = (torch.round(groups * factor[..., None]).clamp(*bounds) + (0 if is_wide else _OFFSET)).flatten(-2)
    if rows.step < GROUP:
        codes[..., rows.length :] = 0
    codes = codes[..., : -(-rows.length // rows.step) * rows.step].to(rows.numbers.dtype)
    if not is_wide:
        lower, upper = codes.reshape(*codes.shape[:-1], -1, 2, rows.step // 2).unbind(-2)
        codes = (lower | upper << 4).flatten(-2)
    return codes, scales
