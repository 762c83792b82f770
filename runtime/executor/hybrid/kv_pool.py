"""Keys and values on the GPU: for every layer whose cache lies there a pool of blocks that all sequences share.

A block has the same number in every layer. Where a pool may not grow, the oldest piece of the sequence that has most of
them there moves to RAM. Invariant: `blocks` of every layer hold what was written, also when getting more memory failed
half way.
"""

import logging
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from cpu_kernels.kv_layout import KVLayout
from gpu_kernels.blocks import KVBlocks
from gpu_kernels.device import GpuDevice, Stream
from runtime.executor.hybrid.kv_blocks import Bytes, empty_blocks, from_host, to_host

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
    """Blocks of `BLOCK_TOKENS` tokens for the layers that have a layout, at first for `tokens` tokens."""

    def __init__(
        self,
        device: GpuDevice,
        stream: Stream,
        layouts: Mapping[int, KVLayout],
        tokens: int,
        most_tokens: int | None = None,
    ) -> None:
        """`most_tokens`: there are blocks for no more, as long as pieces can move to RAM; None: no limit.

        ValueError for types that the GPU's kernels do not read; torch.OutOfMemoryError where it has too little memory.
        """
        self._device, self._stream, self._layouts = device, stream, layouts
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
        for layer in sorted(layouts):
            self._layers[layer] = self._allocate(layer, first)
        if self._layers:
            self._add_free(first)

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose keys and values are here."""
        return tuple(self._layers)

    @property
    def num_bytes(self) -> int:
        """Of the GPU's memory."""
        return sum(blocks.num_bytes for blocks in self._layers.values())

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

    def read(self, layer: int, blocks: Sequence[int], into: Sequence[tuple[Bytes, Bytes]]) -> None:
        """Copies blocks to keys and values (kv_heads, bytes of a block) each, as the layer's layout has them."""
        pool, found = self._layers[layer].parts, []
        for block in blocks:  # one by one: there may be no memory on the GPU to gather them in
            found.append([torch.empty(part.shape[1:], dtype=part.dtype) for part in pool])
            for host, part in zip(found[-1], pool, strict=True):
                self._stream.copy(host, part[block])
        self._stream.synchronize()
        for parts, told in zip(found, into, strict=True):
            to_host(self._layouts[layer], parts, *told)

    def write(self, layer: int, block: int, keys: Bytes, values: Bytes) -> None:
        """Puts there what `read` gives of a block."""
        pool = self._layers[layer].parts
        parts = [torch.empty(part.shape[1:], dtype=part.dtype) for part in pool]
        from_host(self._layouts[layer], keys, values, parts)
        for host, part in zip(parts, pool, strict=True):
            self._stream.copy(part[block], host)
        self._stream.synchronize()

    def _grow(self, count: int) -> None:
        """Layer after layer, so that no more than one layer's blocks are there twice."""
        for layer, old in list(self._layers.items()):
            if old.count >= count:
                continue
            self._layers[layer] = self._copied(layer, old, count)
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
                        for part in blocks.parts:
                            self._stream.copy(part[there], part[block])
                    holder.blocks[place] = there
        self._stream.synchronize()
        self._free = free
        self.generation += 1

    def _cut(self, layer: int, count: int) -> bool:
        """Keeps the first `count` blocks of a layer, or all where there is no memory to copy them to."""
        try:
            self._layers[layer] = self._copied(layer, self._layers[layer], count)
        except torch.OutOfMemoryError:
            return False
        return True

    def _copied(self, layer: int, old: KVBlocks, count: int) -> KVBlocks:
        """`count` blocks of a layer, the first of which are as in `old`."""
        new, kept = self._allocate(layer, count), min(count, old.count)
        for target, source in zip(new.parts, old.parts, strict=True):
            self._stream.copy(target[:kept], source[:kept])
        self._stream.synchronize()
        return new

    def _add_free(self, count: int) -> None:
        self._free.extend(range(count - 1, self._count - 1, -1))
        self._count = count

    def _allocate(self, layer: int, count: int) -> KVBlocks:
        return empty_blocks(self._device, self._layouts[layer], count)


def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)
