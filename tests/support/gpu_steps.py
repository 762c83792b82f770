"""Inputs of GPU operations on odd shapes: caches of blocks in a shuffled order, angles, tables of experts."""

from dataclasses import dataclass

import numpy as np
import torch

from gpu_kernels.blocks import KVBlocks, Lanes, Rotation
from tests.support.gpu_matrices import normal


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One layer's cache."""

    kv_heads: int
    key_length: int
    value_length: int
    block_tokens: int = 16
    is_int8: bool = False

    def empty(self, blocks: int, device: str = "cpu") -> KVBlocks:
        """A pool whose memory holds NaN, or garbage codes: what is not written must not be used."""
        shape = (blocks, self.block_tokens, self.kv_heads)
        if self.is_int8:
            codes = [torch.full((*shape, n), 77, dtype=torch.int8) for n in (self.key_length, self.value_length)]
            scales = [torch.full(shape, torch.nan) for _ in range(2)]
            return KVBlocks(*(tensor.to(device) for tensor in (*codes, *scales)))
        halves = [torch.full((*shape, n), torch.nan).half() for n in (self.key_length, self.value_length)]
        return KVBlocks(*(tensor.to(device) for tensor in halves))


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

    keys (lanes, most tokens, kv_heads, key_length) and values, float32, with zeros behind a lane's length.
    """
    lengths, size = lanes.lengths.tolist(), cache.block_tokens
    kept = []
    for store, scales, which in ((cache.keys, cache.key_scales, 0), (cache.values, cache.value_scales, 1)):
        held = torch.zeros((lanes.count, max(lengths), *store.shape[2:]))
        for lane, length in enumerate(lengths):
            numbers = normal(seed + 2 * lane + which, length, *store.shape[2:])
            for token in range(length):
                block, place = int(lanes.table[lane, token // size]), token % size
                if scales is None:
                    store[block, place] = numbers[token].half().to(store.device)
                    held[lane, token] = numbers[token].half().float()
                else:
                    scale = numbers[token].abs().amax(-1) / 127
                    codes = torch.round(numbers[token] / scale[:, None])
                    store[block, place] = codes.to(torch.int8).to(store.device)
                    scales[block, place] = scale.to(store.device)
                    held[lane, token] = codes * scale[:, None]
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
