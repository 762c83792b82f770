"""Launches of the attention kernels. Knows nothing about models; buffers come from torch's allocator."""

import torch

from gpu_kernels.blocks import GROUP, KVBlocks, KVRows, Lanes, Rotation
from gpu_kernels.tiles import SPLIT_TOKENS, GpuTraits, attention_tile, power_of_two
from gpu_kernels.triton_attention import attention_kernel
from gpu_kernels.triton_heads import heads_kernel
from gpu_kernels.triton_parts import join_parts_kernel, merge_splits_kernel

_MERGED = 16  # parts at a time


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
    gpu: GpuTraits,
    is_exact: bool,
) -> None:
    """See `Kernels.attention`.

    Products are float16 with float32 sums where there are matrix units; else, and with bfloat16, which has greater
    numbers, float32.
    """
    tokens = queries.shape[0]
    each = lanes.tokens_each(tokens)
    heads = queries.shape[1] // cache.key_length
    group = heads // cache.kv_heads
    capacity = lanes.table.shape[1] * cache.block_tokens
    longest = max(cache.key_length, cache.value_length)
    is_float32 = is_exact or not gpu.has_matrix_units or "bf16" in (cache.keys.kind, cache.values.kind)
    tile = attention_tile(group, each, capacity, longest, is_float32=is_float32)
    is_split = tile.splits > 1
    parts = sums = out
    has_marks, told = marks is not None, out if marks is None else marks
    if is_split:
        parts = torch.empty((tile.splits, tokens, heads, cache.value_length), device=out.device)
        sums = torch.empty((tile.splits, tokens, heads), device=out.device)
    (keys, key_scales), (values, value_scales) = _places(cache.keys), _places(cache.values)
    padded_key, padded_value = _width(cache.keys, 16), _width(cache.values, 16)
    attention_kernel[(-(-each * group // tile.rows), lanes.count * cache.kv_heads, tile.splits)](
        *(queries, keys, values, key_scales, value_scales, lanes.table, lanes.lengths),
        *(out, parts, sums, told),
        *(each, lanes.table.stride(0), queries.stride(0), out.stride(0), told.stride(0), cache.kv_heads),
        *(scale, window or 0, softcap or 1.0),
        GROUP=group,
        KEY=cache.key_length,
        VALUE=cache.value_length,
        D=padded_key,
        E=padded_value,
        BLOCK_TOKENS=cache.block_tokens,
        M=tile.rows,
        N=tile.tokens,
        **_forms(cache),
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_MARKS=has_marks,
        IS_SPLIT=is_split,
        SPLIT=SPLIT_TOKENS,
        IS_EXACT=is_float32,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    if is_split:
        merge_splits_kernel[(tokens, heads)](
            *(parts, sums, out, told, tile.splits, tokens, heads, out.stride(0), told.stride(0)),
            VALUE=cache.value_length,
            E=padded_value,
            S=_MERGED,
            HAS_MARKS=has_marks,
            enable_fp_fusion=True,
        )


def join_parts(out: torch.Tensor, marks: torch.Tensor, part: torch.Tensor) -> None:
    """See `Kernels.join_parts`."""
    tokens, heads = out.shape[0], marks.shape[1] // 2
    value_length = out.shape[1] // heads
    join_parts_kernel[(tokens, heads)](
        *(out, marks, part, heads, out.stride(0), marks.stride(0), part.stride(0)),
        VALUE=value_length,
        E=power_of_two(value_length),
        num_warps=1,
        enable_fp_fusion=True,
    )


def turn_and_append(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cache: KVBlocks,
    lanes: Lanes,
    *,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """See `Kernels.heads`."""
    tokens, length = queries.shape[0], cache.key_length
    heads = queries.shape[1] // length
    (key_cache, key_scales), (value_cache, value_scales) = _places(cache.keys), _places(cache.values)
    heads_kernel[(tokens, heads + 2 * cache.kv_heads)](
        *(queries, keys, values, positions, rotation.cos, rotation.sin),
        *(key_cache, value_cache, key_scales, value_scales, lanes.table),
        *(queries if query_norm is None else query_norm, keys if key_norm is None else key_norm),
        *(lanes.tokens_each(tokens), lanes.table.stride(0), queries.stride(0), keys.stride(0), values.stride(0)),
        *(heads, cache.kv_heads, eps),
        LENGTH=length,
        VALUE=cache.value_length,
        PAIRS=rotation.pairs,
        D=_width(cache.keys, 1),
        E=_width(cache.values, 1),
        BLOCK_TOKENS=cache.block_tokens,
        NEIGHBOURS=rotation.neighbours,
        HAS_NORM=query_norm is not None,
        TURNS_KEYS=cache.keys.is_turned,
        **_forms(cache),
        num_warps=1,
        enable_fp_fusion=False,  # codes are rounded as the CPU's
    )


def _forms(cache: KVBlocks) -> dict[str, str | int | bool]:
    """What kernels are compiled for, of how rows are kept."""
    keys, values = cache.keys, cache.values
    return {
        "KEY_KIND": keys.kind,
        "KEY_STEP": keys.step,
        "VALUE_KIND": values.kind,
        "VALUE_STEP": values.step,
        "TURNS_VALUES": values.is_turned,
    }


def _places(rows: KVRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, of bfloat16 the bits; scales, or something in their place that is not read."""
    numbers = rows.numbers.view(torch.int16) if rows.kind == "bf16" else rows.numbers
    return numbers, numbers if rows.scales is None else rows.scales


def _width(rows: KVRows, least: int) -> int:
    """Of vectors that hold a row: whole groups where it has some."""
    return max(least if rows.scales is None else GROUP, power_of_two(rows.length))
