"""Inputs of GPU operations on odd shapes: caches of blocks in a shuffled order, angles, tables of experts."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from gpu_kernels import torch_rows
from gpu_kernels.blocks import GROUP, KVBlocks, KVRows, Lanes, Rotation, row_numbers
from tests.support.gpu_matrices import normal

KINDS = ("f16", "bf16", "q8_0", "q4_0")
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.int8, "q4_0": torch.uint8}
_KEY_STEPS = {"f16": 1, "bf16": 1, "q8_0": 2, "q4_0": 4}


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One layer's cache, its rows turned where they are coded and their length allows it."""

    kv_heads: int
    key_length: int
    value_length: int
    block_tokens: int = 16
    kind: str = "f16"
    value_kind: str | None = None

    def empty(self, blocks: int, device: str = "cpu") -> KVBlocks:
        """A pool whose memory holds NaN, or garbage codes: what is not written must not be used."""
        shape = (blocks, self.block_tokens, self.kv_heads)
        keys = _rows(shape, self.key_length, self.kind, _KEY_STEPS[self.kind], device)
        kind = self.value_kind or self.kind
        return KVBlocks(
            keys, _rows(shape, self.value_length, kind, 1 if _DTYPES[kind].is_floating_point else GROUP, device)
        )


def _rows(shape: tuple[int, ...], length: int, kind: str, step: int, device: str) -> KVRows:
    dtype = _DTYPES[kind]
    is_coded = not dtype.is_floating_point
    filling = 77 if is_coded else torch.nan
    numbers = torch.full((*shape, row_numbers(dtype, length, step)), filling, dtype=dtype, device=device)
    if not is_coded:
        return KVRows(numbers, length)
    scales = torch.full((*shape, -(-length // GROUP)), torch.nan, dtype=torch.float16, device=device)
    return KVRows(numbers, length, scales, step, is_turned=length & (length - 1) == 0)


def cache_on(cache: KVBlocks, device: str) -> KVBlocks:
    """A copy on another device."""

    def moved(rows: KVRows) -> KVRows:
        scales = None if rows.scales is None else rows.scales.to(device)
        return replace(rows, numbers=rows.numbers.to(device), scales=scales)

    return KVBlocks(moved(cache.keys), moved(cache.values))


def lanes_of(lengths: list[int], block_tokens: int, *, spare: int = 1, device: str = "cpu") -> tuple[Lanes, int]:
    """Lanes of these lengths with `spare` more blocks each, in a shuffled order; and how many blocks the pool has."""
    most = max(-(-length // block_tokens) for length in lengths) + spare
    order = np.random.default_rng(len(lengths)).permutation(most * len(lengths)).astype(np.int32)
    table = torch.from_numpy(order.reshape(len(lengths), most)).to(device)
    return Lanes(table, torch.tensor(lengths, dtype=torch.int32, device=device)), most * len(lengths)


def rotation_of(positions: int, pairs: int, *, neighbours: bool, device: str = "cpu") -> Rotation:
    """Angles position / 10000^(pair / pairs)."""
    angles = torch.arange(positions)[:, None] / 10000 ** (torch.arange(pairs) / pairs)
    return Rotation(angles.cos().float().to(device), angles.sin().float().to(device), neighbours)


def fill(cache: KVBlocks, lanes: Lanes, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts random keys and values where the lanes' tokens lie; returns what the cache then holds, by lane and token.

    keys (lanes, most tokens, kv_heads, key_length) and values, float32, with zeros behind a lane's length; those that
    are turned as they are there.
    """
    lengths, size = lanes.lengths.tolist(), cache.block_tokens
    kept = []
    for rows, which in ((cache.keys, 0), (cache.values, 1)):
        held = torch.zeros((lanes.count, max(lengths), cache.kv_heads, rows.length))
        for lane, length in enumerate(lengths):
            token = torch.arange(length)
            block, place = lanes.table[lane, token // size].long(), token % size
            torch_rows.put(rows, block, place, normal(seed + 2 * lane + which, length, cache.kv_heads, rows.length))
            held[lane, :length] = torch_rows.read(rows, block)[token, place]
        kept.append(held)
    return kept[0], kept[1]


def segments_of(counts: list[tuple[int, int]], extra: int = 2) -> torch.Tensor:
    """(slot, pairs) to segments that follow each other, with `extra` empty ones; expert = slot + 1."""
    first, rows = 0, []
    for slot, pairs in counts:
        rows.append([slot, first, pairs, slot + 1])
        first += pairs
    rows += [[0, 0, 0, 0]] * extra
    return torch.tensor(rows, dtype=torch.int32)
