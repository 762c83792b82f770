"""Keys and values on the GPU: for every layer whose cache lies there a pool of blocks that all sequences share.

A block has the same number in every layer. Where a pool may not grow, the oldest piece of the sequence that has most of
them there moves to RAM. Invariant: `blocks` of every layer hold what was written, also when getting more memory failed
half way.
"""

import logging
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_kernels.blocks import KVBlocks
from gpu_kernels.device import GpuDevice, Stream
from runtime.architectures.base import Model

log = logging.getLogger("strata.kv")

BLOCK_TOKENS = 64
GROWTH = 1.5
KEPT_SHARE = 3, 4  # of the blocks, when memory is to be given back


class Holder(Protocol):
    """A sequence with blocks of a pool."""

    blocks: list[int]

    @property
    def movable_pieces(self) -> int:
        """Its first pieces on the GPU that no pass under way writes to."""
        ...

    def move_piece(self) -> None:
        """Moves the first of them to RAM, in all layers of the pool, and gives its blocks back."""
        ...


class KVPool:
    """Blocks of `BLOCK_TOKENS` tokens in float16 for the layers that `layers` tells, at first for `tokens` tokens."""

    def __init__(
        self,
        device: GpuDevice,
        stream: Stream,
        model: Model,
        layers: Iterable[int],
        tokens: int,
        most_tokens: int | None = None,
    ) -> None:
        """`most_tokens`: there are blocks for no more, as long as pieces can move to RAM; None: no limit.

        torch.OutOfMemoryError where the GPU has too little memory.
        """
        self._device, self._stream = device, stream
        self._widths = (model.head_count_kv, model.key_length), (model.head_count_kv, model.value_length)
        self._layers: dict[int, KVBlocks] = {}
        self._free: list[int] = []
        self._count = 0
        self._most = sys.maxsize if most_tokens is None else blocks_of(most_tokens)
        self._holders: weakref.WeakValueDictionary[int, Holder] = weakref.WeakValueDictionary()  # by age
        self._added = 0
        self._told = False
        self.generation = 0  # grows when blocks have moved
        self.lock = threading.Lock()  # of whoever takes blocks for a sequence
        first = min(blocks_of(tokens), self._most)
        for layer in sorted(layers):
            self._layers[layer] = self._allocate(first)
        if self._layers:
            self._add_free(first)

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose keys and values are here."""
        return tuple(self._layers)

    @property
    def num_bytes(self) -> int:
        """Of the GPU's memory."""
        return sum(blocks.keys.nbytes + blocks.values.nbytes for blocks in self._layers.values())

    def blocks(self, layer: int) -> KVBlocks:
        """A layer's blocks; they move when `generation` grows."""
        return self._layers[layer]

    def add(self, holder: Holder) -> None:
        """A sequence that will have blocks."""
        self._holders[self._added] = holder
        self._added += 1

    def take(self, count: int) -> list[int]:
        """So many free blocks. Where they are too few, it grows as far as it may; then pieces move to RAM; then it
        grows all the same, or torch.OutOfMemoryError.
        """
        if not self._layers:
            return []
        while (lacking := count - len(self._free)) > 0:
            wanted = self._count + lacking
            if wanted <= self._most:
                self._grow(max(wanted, min(int(self._count * GROWTH), self._most)))
            elif not self._move_piece():
                self._grow(wanted)
        return [self._free.pop() for _ in range(count)]

    def shrink(self) -> bool:
        """Gives back a quarter of the memory for good, whatever must move to RAM for that; whether it could."""
        kept = self._count * KEPT_SHARE[0] // KEPT_SHARE[1]
        with self.lock:
            while self._count - len(self._free) > kept and self._move_piece():
                pass
            if not self._layers or not kept or self._count - len(self._free) > kept:
                return False
            self._pack(kept)
            freed = sum(self._cut(layer, kept) for layer in list(self._layers))
            self._count = self._most = kept
        return freed > 0

    def give(self, blocks: Sequence[int]) -> None:
        """Blocks that nobody uses any more."""
        self._free.extend(blocks)

    def drop(self, layer: int) -> None:
        """A layer's keys and values are elsewhere from now on."""
        del self._layers[layer]
        self.generation += 1

    def read(self, layer: int, blocks: Sequence[int]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """(keys, values) in these blocks, each (kv_heads, tokens, length)."""
        found = []
        for pool in (self._layers[layer].keys, self._layers[layer].values):
            host = torch.empty((len(blocks), *pool.shape[1:]), dtype=pool.dtype)
            for number, block in enumerate(blocks):  # one by one: there may be no memory on the GPU to gather them in
                self._stream.copy(host[number], pool[block])
            self._stream.synchronize()
            found.append(host.flatten(0, 1).transpose(0, 1).numpy())
        return found[0], found[1]

    def write(self, layer: int, block: int, keys: NDArray[np.float16], values: NDArray[np.float16]) -> None:
        """Puts the rows of a block there, as `read` tells them: (kv_heads, tokens, length) each."""
        blocks = self._layers[layer]
        for pool, rows in ((blocks.keys, keys), (blocks.values, values)):
            self._stream.copy(pool[block], torch.from_numpy(np.ascontiguousarray(rows.transpose(1, 0, 2))))
        self._stream.synchronize()

    def _grow(self, count: int) -> None:
        """Layer after layer, so that no more than one layer's blocks are there twice."""
        for layer, old in list(self._layers.items()):
            have = old.keys.shape[0]
            if have >= count:
                continue
            new = self._allocate(count)
            self._stream.copy(new.keys[:have], old.keys)
            self._stream.copy(new.values[:have], old.values)
            self._stream.synchronize()
            self._layers[layer] = new
            self.generation += 1
        self._add_free(count)

    def _move_piece(self) -> bool:
        """Moves the oldest piece of the sequence that can move most of them to RAM; False if there is none."""
        holder = max(self._by_age(), key=lambda held: held.movable_pieces, default=None)
        if holder is None or not holder.movable_pieces:
            return False
        tell = log.debug if self._told else log.info
        tell("KV: the GPU has no more room; the oldest keys and values of its layers move to RAM, 512 tokens at a time")
        self._told = True
        holder.move_piece()
        return True

    def _by_age(self) -> list[Holder]:
        return [holder for _, holder in sorted(self._holders.items(), key=lambda item: item[0])]

    def _pack(self, count: int) -> None:
        """All blocks that are in use are among the first `count`."""
        holders = self._by_age()  # none of which can be forgotten meanwhile
        free = [block for block in self._free if block < count]
        for holder in holders:
            for place, block in enumerate(holder.blocks):
                if block >= count:
                    there = free.pop()
                    for blocks in self._layers.values():
                        self._stream.copy(blocks.keys[there], blocks.keys[block])
                        self._stream.copy(blocks.values[there], blocks.values[block])
                    holder.blocks[place] = there
        self._stream.synchronize()
        self._free = free
        self.generation += 1

    def _cut(self, layer: int, count: int) -> bool:
        """Keeps the first `count` blocks of a layer, or all where there is no memory to copy them to."""
        old = self._layers[layer]
        try:
            new = self._allocate(count)
        except torch.OutOfMemoryError:
            return False
        self._stream.copy(new.keys, old.keys[:count])
        self._stream.copy(new.values, old.values[:count])
        self._stream.synchronize()
        self._layers[layer] = new
        return True

    def _add_free(self, count: int) -> None:
        self._free.extend(range(count - 1, self._count - 1, -1))
        self._count = count

    def _allocate(self, count: int) -> KVBlocks:
        parts = [self._device.empty((count, BLOCK_TOKENS, *width), torch.float16) for width in self._widths]
        return KVBlocks(*parts)


def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)
