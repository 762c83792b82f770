"""Keys and values through the coded types by the plainest numpy: what the kernels are held to.

Rounding is float32 throughout, in the kernels' order, so that integers and scales must agree to the last bit.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS, TILE_DIMS, KVLayout
from cpu_kernels.kv_types import GROUP, PAIR, KVType

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def rounded(x: Floats, kind: KVType, group: int = GROUP) -> Floats:
    """Every group of up to `group` numbers along the last axis through codes and back."""
    out = np.empty_like(x)
    for first in range(0, x.shape[-1], group):
        part = x[..., first : first + group]
        codes, scale, least = encoded(part, kind)
        out[..., first : first + group] = codes.astype(np.float32) * scale + least
    return out


def encoded(group: Floats, kind: KVType) -> tuple[NDArray[np.int32], Floats, Floats]:
    """Integers, scale and minimum of each group along the last axis; the minimum is 0 where the type has none."""
    low, high = group.min(-1, keepdims=True), group.max(-1, keepdims=True)
    least = np.zeros_like(low)
    if kind.has_minimum:
        least = _half(low)
        scale = _half((high - least) * np.float32(1 / kind.highest))
    elif kind is KVType.Q4_0:  # the greatest in size becomes -8
        scale = _half(np.where(-low >= high, low, high) * np.float32(-1 / 8))
    else:
        scale = _half(np.maximum(high, -low) * np.float32(1 / kind.highest))
    with np.errstate(divide="ignore"):
        factor = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    lowest = 0 if kind.has_minimum else -8 if kind is KVType.Q4_0 else -kind.highest
    codes = np.clip(np.rint((group - least) * factor), lowest, kind.highest)
    return codes.astype(np.int32), scale, least


def walsh_hadamard(x: Floats) -> Floats:
    """Times the orthogonal Walsh-Hadamard matrix along the last axis, a power of two."""
    length = x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < length:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(x.astype(np.float64) @ matrix / np.sqrt(length), np.float32)


def bfloat(x: Floats) -> Floats:
    """To bfloat16 and back, to nearest, ties to even; finite numbers."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def unpacked_keys(layout: KVLayout, chunks: Sequence[Bytes], tokens: int) -> Floats:
    """(kv_heads, tokens, key_length) of the first tokens, whatever their type; of a window's only the full blocks."""
    kind, length = layout.key_type, layout.key_length
    blocks = np.concatenate([layout.keys_of(chunk).reshape(-1, layout.key_block_bytes) for chunk in chunks])
    decoded = np.stack([_key_block(block, kind, length) for block in blocks])
    return _by_head(decoded, layout)[:, :tokens]


def unpacked_values(layout: KVLayout, chunks: Sequence[Bytes], tokens: int) -> Floats:
    """(kv_heads, tokens, value_length) of the first tokens, whatever their type."""
    kind, length = layout.value_type, layout.value_length
    blocks = np.concatenate([layout.values_of(chunk).reshape(-1, layout.value_block_bytes) for chunk in chunks])
    decoded = np.stack([_value_block(block, kind, length) for block in blocks])
    return _by_head(decoded, layout)[:, :tokens]


def _by_head(blocks: Floats, layout: KVLayout) -> Floats:
    """(pieces * heads * 8, 64, length) to (heads, tokens, length)."""
    length = blocks.shape[-1]
    parts = blocks.reshape(-1, layout.kv_heads, PIECE_BLOCKS * BLOCK_TOKENS, length)
    return parts.transpose(1, 0, 2, 3).reshape(layout.kv_heads, -1, length)


def _key_block(block: Bytes, kind: KVType, length: int) -> Floats:
    """(64, length)."""
    end = kind.key_codes_bytes(length)
    if not kind.is_coded:
        return _wide(block[:end], kind).reshape(length, BLOCK_TOKENS).T
    steps = block[:end].reshape(-1, BLOCK_TOKENS, PAIR)  # a byte's parts lie two dimensions apart
    codes = _split(steps, kind).transpose(0, 3, 2, 1).reshape(-1, BLOCK_TOKENS)[:length].T - np.float32(kind.offset)
    scales_end = end + kind.key_scales_bytes(length)
    scales = block[end:scales_end].view(np.float16).astype(np.float32)
    if not kind.has_minimum:
        return codes * scales.reshape(-1, BLOCK_TOKENS).repeat(kind.key_group, axis=0)[:length].T
    return codes * scales + block[scales_end : scales_end + 2 * length].view(np.float16).astype(np.float32)


def _value_block(block: Bytes, kind: KVType, length: int) -> Floats:
    """(64, length)."""
    end, tiles = kind.value_codes_bytes(length), -(-length // TILE_DIMS)
    raw = block[:end]
    if not kind.is_coded:
        return _tiles(_wide(raw, kind).reshape(tiles, BLOCK_TOKENS, TILE_DIMS), length)
    steps = raw.reshape(tiles, BLOCK_TOKENS // PAIR, -1, PAIR)  # a byte's parts lie a tile's bytes apart
    codes = _split(steps, kind).transpose(0, 1, 3, 4, 2).reshape(tiles, BLOCK_TOKENS, TILE_DIMS)
    codes -= np.float32(kind.offset)
    scales_bytes = kind.value_scales_bytes(length)
    groups = -(-length // kind.value_group)
    scales = block[end:].view(np.float16).astype(np.float32).reshape(-1, groups, BLOCK_TOKENS, 1)
    parts = scales.repeat(kind.value_group // TILE_DIMS, axis=1)[:, :tiles]
    assert scales.nbytes // 2 == scales_bytes * (2 if kind.has_minimum else 1), "scales and minima fill the block"
    decoded = codes * parts[0]
    return _tiles(decoded + parts[1] if kind.has_minimum else decoded, length)


def _tiles(tiles: Floats, length: int) -> Floats:
    return tiles.transpose(1, 0, 2).reshape(BLOCK_TOKENS, -1)[:, :length]


def _split(bytes_: Bytes, kind: KVType) -> Floats:
    """(...) bytes to (..., codes a byte) codes."""
    if kind is KVType.Q8_0:
        return bytes_.view(np.int8).astype(np.float32)[..., None]
    shifts = np.arange(0, 8, kind.bits, dtype=np.uint8)
    return (bytes_[..., None] >> shifts & ((1 << kind.bits) - 1)).astype(np.float32)


def _wide(raw: Bytes, kind: KVType) -> Floats:
    if kind is KVType.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16).astype(np.float32)


def _half(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)
