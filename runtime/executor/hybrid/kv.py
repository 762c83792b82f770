"""The keys and values of one sequence of a hybrid model: layers of the CPU in RAM, layers of the GPU in its pool.

Knows nothing about models. Invariants: as for `ProgramKV`, on both devices, and saved rows are the same bytes; blocks
go back when a sequence is forgotten.
"""

import weakref
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_layout import TILE_DIMS, pieces_of
from runtime.executor.hybrid.kv_pool import BLOCK_TOKENS, KVPool, blocks_of
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_tiers import KVTiers


class HybridKV(ProgramKV):
    """`blocks`: those of the pool in which the first tokens lie, in order."""

    def __init__(
        self,
        pool: KVPool,
        layers: int,
        kv_heads: int,
        key_length: int,
        value_length: int,
        capacity_tokens: int,
        tiers: KVTiers | None = None,
    ) -> None:
        """ValueError for a capacity below 1."""
        super().__init__(layers, kv_heads, key_length, value_length, capacity_tokens, tiers=tiers)
        self.blocks: list[int] = []
        self._pool = pool
        weakref.finalize(self, _give_back, pool, self.blocks).atexit = False

    def reserve(self, tokens: int) -> None:
        """Takes blocks for so many tokens; torch.OutOfMemoryError where the GPU has no more."""
        with self._pool.lock:
            lacking = blocks_of(tokens) - len(self.blocks)
            if lacking > 0:
                self.blocks.extend(self._pool.take(lacking))

    def truncate(self, length: int) -> None:
        """See `ProgramKV`."""
        super().truncate(length)
        kept = blocks_of(length)
        self._pool.give(self.blocks[kept:])
        del self.blocks[kept:]

    def share(self, other: ProgramKV, length: int) -> int:
        """See `ProgramKV`; nothing where layers lie on the GPU: a pool's blocks are not shared."""
        return 0 if self._pool.layers else super().share(other, length)

    def bring_to_ram(self, layer: int) -> None:
        """Copies a layer's keys and values from the pool to RAM, those of a call that is not yet over too."""
        keys, values = self._pool.read(layer, self.blocks)
        self._hold(pieces_of(len(self.blocks) * BLOCK_TOKENS))
        layout, chunks = self.layout.layers[layer], self.layer_chunks(layer)
        layout.pack_keys(chunks, keys)
        layout.pack_values(chunks, values)

    def export_block(self, index: int, out: NDArray[np.uint8]) -> None:
        """See `SavedRows`."""
        super().export_block(index, out)
        for layer, keys, values in self._gpu_parts(out):
            found = self._pool.read(layer, self.blocks[index : index + 1])
            keys[:] = found[0].transpose(0, 2, 1)
            for tile in range(self.layout.layers[layer].value_tiles):
                dims = found[1][..., tile * TILE_DIMS : (tile + 1) * TILE_DIMS]
                values[:, tile, :, : dims.shape[2]] = dims
                values[:, tile, :, dims.shape[2] :] = 0

    def import_block(self, index: int, data: NDArray[np.uint8]) -> None:
        """See `SavedRows`; torch.OutOfMemoryError where the GPU has no more."""
        super().import_block(index, data)
        self.reserve((index + 1) * BLOCK_TOKENS)
        for layer, keys, values in self._gpu_parts(data):
            flat = values.transpose(0, 2, 1, 3).reshape(len(values), BLOCK_TOKENS, -1)
            told = keys.transpose(0, 2, 1), flat[..., : self.layout.layers[layer].value_length]
            self._pool.write(layer, self.blocks[index], *told)

    def _gpu_parts(self, data: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.float16], NDArray[np.float16]]]:
        """(layer, keys (kv_heads, key_length, tokens), values (kv_heads, tiles, tokens, dimensions)) of a block's bytes
        for the layers of the pool; views.
        """
        layout = self.layout.layers[0]  # all are float16
        told = data.reshape(len(self.layout.layers), -1)
        middle = layout.kv_heads * layout.key_block_bytes
        for layer in self._pool.layers:
            keys = told[layer, :middle].view(np.float16).reshape(layout.kv_heads, layout.key_length, BLOCK_TOKENS)
            values = told[layer, middle:].view(np.float16)
            yield layer, keys, values.reshape(layout.kv_heads, layout.value_tiles, BLOCK_TOKENS, TILE_DIMS)


def _give_back(pool: KVPool, blocks: list[int]) -> None:
    pool.give(blocks)
    blocks.clear()
