"""Keys and values on the GPU: for every layer whose cache lies there a pool of blocks that all sequences share.

A block has the same number in every layer. Knows nothing about which sequence has which block. Invariant: `blocks` of
every layer hold what was written, also when getting more memory failed half way.
"""

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_kernels.blocks import KVBlocks
from gpu_kernels.device import GpuDevice, Stream
from runtime.architectures.base import Model

BLOCK_TOKENS = 64
GROWTH = 1.5


class KVPool:
    """Blocks of `BLOCK_TOKENS` tokens in float16 for the layers that `layers` tells, at first for `tokens` tokens."""

    def __init__(self, device: GpuDevice, stream: Stream, model: Model, layers: Iterable[int], tokens: int) -> None:
        """torch.OutOfMemoryError where the GPU has too little memory."""
        self._device, self._stream = device, stream
        self._widths = (model.head_count_kv, model.key_length), (model.head_count_kv, model.value_length)
        self._layers: dict[int, KVBlocks] = {}
        self._free: list[int] = []
        self._count = 0
        self.generation = 0  # grows when blocks have moved
        self.lock = threading.Lock()  # of whoever takes blocks for a sequence
        for layer in sorted(layers):
            self._layers[layer] = self._allocate(blocks_of(tokens))
        if self._layers:
            self._add_free(blocks_of(tokens))

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

    def take(self, count: int) -> list[int]:
        """So many free blocks; gets more memory where they are too few, or torch.OutOfMemoryError."""
        lacking = count - len(self._free)
        if lacking > 0 and self._layers:
            self._grow(max(self._count + lacking, int(self._count * GROWTH)))
        return [self._free.pop() for _ in range(count)] if self._layers else []

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

    def _add_free(self, count: int) -> None:
        self._free.extend(range(count - 1, self._count - 1, -1))
        self._count = count

    def _allocate(self, count: int) -> KVBlocks:
        parts = [self._device.empty((count, BLOCK_TOKENS, *width), torch.float16) for width in self._widths]
        return KVBlocks(*parts)


def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)
