"""Blocks of keys and values as the GPU's kernels want them, and the same bytes in the order of the host's kernels.

`gpu_kernels.blocks` says how the former lie, `cpu_kernels.kv_layout` the latter. Numbers and codes are the same on both
sides, so that nothing is lost on the way. Knows nothing about pools and sequences.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cpu_kernels.kv_layout import BLOCK_TOKENS, KVLayout
from cpu_kernels.kv_types import HALF_BYTES, PAIR, TILE_DIMS, KVType
from gpu_kernels.blocks import GROUP, KVBlocks, KVRows, row_numbers
from gpu_kernels.device import GpuDevice

Bytes = NDArray[np.uint8]

_DTYPES = {
    KVType.F16: torch.float16,
    KVType.BF16: torch.bfloat16,
    KVType.Q8_0: torch.int8,
    KVType.Q4_0: torch.uint8,
}


def empty_blocks(device: GpuDevice, layout: KVLayout, count: int) -> KVBlocks:
    """Blocks for a layer; ValueError for types that the GPU's kernels do not read, torch.OutOfMemoryError."""
    value_step = TILE_DIMS if layout.value_type.is_coded else 1
    shape = (count, BLOCK_TOKENS, layout.kv_heads)
    return KVBlocks(
        _rows(device, shape, layout.key_type, layout.key_length, layout.key_type.step_dims, layout.rotates_keys),
        _rows(device, shape, layout.value_type, layout.value_length, value_step, layout.rotates_values),
    )


def to_host(layout: KVLayout, parts: Sequence[torch.Tensor], keys: Bytes, values: Bytes) -> None:
    """A block's parts, as `KVBlocks` has them, in RAM, go to keys and values (kv_heads, bytes of a block)."""
    for part, view in zip(parts, _views(layout, keys, values), strict=True):
        rows = part.view(torch.uint8).numpy()
        missing = view.size // (BLOCK_TOKENS * layout.kv_heads) - rows.shape[2]  # of the last tile of float16 values
        view[:] = (np.pad(rows, ((0, 0), (0, 0), (0, missing))) if missing else rows).reshape(view.shape)


def from_host(layout: KVLayout, keys: Bytes, values: Bytes, parts: Sequence[torch.Tensor]) -> None:
    """The way back."""
    for part, view in zip(parts, _views(layout, keys, values), strict=True):
        rows = part.view(torch.uint8).numpy()
        rows[:] = view.reshape(BLOCK_TOKENS, layout.kv_heads, -1)[..., : rows.shape[2]]


def _rows(
    device: GpuDevice, shape: tuple[int, int, int], kind: KVType, length: int, step: int, is_turned: bool
) -> KVRows:
    if kind not in _DTYPES:
        raise ValueError(f"keys or values in {kind} cannot be on the GPU, whose kernels read {', '.join(_DTYPES)}")
    numbers = device.empty((*shape, row_numbers(_DTYPES[kind], length, step)), _DTYPES[kind])
    scales = device.empty((*shape, -(-length // GROUP)), torch.float16) if kind.is_coded else None
    return KVRows(numbers, length, scales, step, is_turned)


def _views(layout: KVLayout, keys: Bytes, values: Bytes) -> Iterator[Bytes]:
    """Of each part the bytes, in the order of the GPU's: tokens, heads, and what they have."""
    heads, kind, length = layout.kv_heads, layout.key_type, layout.key_length
    codes, scales = kind.key_codes_bytes(length), kind.key_scales_bytes(length)
    yield keys[:, :codes].reshape(heads, -1, BLOCK_TOKENS, HALF_BYTES).transpose(2, 0, 1, 3)
    if scales:
        yield _scales(keys[:, codes : codes + scales])
    kind, length = layout.value_type, layout.value_length
    codes, scales = kind.value_codes_bytes(length), kind.value_scales_bytes(length)
    together = PAIR if kind.is_coded else 1  # tokens whose bytes take turns
    tiles = values[:, :codes].reshape(heads, -1, BLOCK_TOKENS // together, kind.value_tile_bytes, together)
    yield tiles.transpose(2, 4, 0, 1, 3)
    if scales:
        yield _scales(values[:, codes : codes + scales])


def _scales(scales: Bytes) -> Bytes:
    """From (heads, groups of channels, tokens)."""
    return scales.reshape(len(scales), -1, BLOCK_TOKENS, HALF_BYTES).transpose(2, 0, 1, 3)
