"""The keys and values of one sequence of a hybrid model: layers of the CPU in RAM, layers of the GPU in its pool.

Of the latter the first pieces may lie in RAM too, in chunks as those of the CPU's layers; new tokens are always put on
the GPU. Knows nothing about models. Invariants: as for `ProgramKV`, on both devices, and saved rows are the same bytes;
a pass finds all tokens from the piece that it begins in on the GPU; blocks go back when a sequence is forgotten.
"""

import weakref
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_layout import PIECE_BLOCKS, PIECE_TOKENS, TILE_DIMS, pieces_of
from runtime.executor.hybrid.kv_pool import BLOCK_TOKENS, KVPool, blocks_of
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_tiers import KVTiers


class HybridKV(ProgramKV):
    """`blocks`: those of the pool in which the tokens behind the first `ram_pieces` pieces lie, in order."""

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
        self.ram_pieces = 0
        self._pool = pool
        pool.add(self)
        weakref.finalize(self, _give_back, pool, self.blocks).atexit = False

    @property
    def ram_tokens(self) -> int:
        """The first tokens, which lie in RAM in layers of the pool too."""
        return self.ram_pieces * PIECE_TOKENS

    @property
    def ram_blocks(self) -> int:
        """Blocks that these would take."""
        return self.ram_pieces * PIECE_BLOCKS

    def prepare(self, start: int, stop: int) -> None:
        """See `ProgramKV`; torch.OutOfMemoryError where the GPU has no room for what must be there."""
        super().prepare(start, stop)
        if not self._pool.layers:
            return
        with self._pool.lock:
            if self.ram_tokens > start:
                self._bring_last_piece()
            lacking = blocks_of(stop) - self.ram_blocks - len(self.blocks)
            if lacking > 0:
                self.blocks.extend(self._pool.take(lacking))

    @property
    def movable_pieces(self) -> int:
        """See `Holder`."""
        return max(min(self.settled_tokens // PIECE_TOKENS - self.ram_pieces, len(self.blocks) // PIECE_BLOCKS), 0)

    def move_piece(self) -> None:
        """See `Holder`."""
        for layer in self._pool.layers:
            self._put(layer, self.ram_pieces, self.blocks[:PIECE_BLOCKS])
        self._pool.give(self.blocks[:PIECE_BLOCKS])
        del self.blocks[:PIECE_BLOCKS]
        self.ram_pieces += 1

    def truncate(self, length: int) -> None:
        """See `ProgramKV`."""
        super().truncate(length)
        self.ram_pieces = min(self.ram_pieces, pieces_of(length))
        kept = max(blocks_of(length) - self.ram_blocks, 0)
        self._pool.give(self.blocks[kept:])
        del self.blocks[kept:]

    def share(self, other: ProgramKV, length: int) -> int:
        """See `ProgramKV`; nothing where layers lie on the GPU: a pool's blocks are not shared."""
        return 0 if self._pool.layers else super().share(other, length)

    def bring_to_ram(self, layer: int) -> None:
        """Copies a layer's keys and values from the pool to RAM, those of a call that is not yet over too."""
        self._hold(pieces_of(self.ram_tokens + len(self.blocks) * BLOCK_TOKENS))
        self._put(layer, self.ram_pieces, self.blocks)

    def export_block(self, index: int, out: NDArray[np.uint8]) -> None:
        """See `SavedRows`."""
        super().export_block(index, out)
        place = index - self.ram_blocks
        if place < 0:
            return
        for layer, keys, values in self._gpu_parts(out):
            found = self._pool.read(layer, self.blocks[place : place + 1])
            keys[:] = found[0].transpose(0, 2, 1)
            for tile in range(self.layout.layers[layer].value_tiles):
                dims = found[1][..., tile * TILE_DIMS : (tile + 1) * TILE_DIMS]
                values[:, tile, :, : dims.shape[2]] = dims
                values[:, tile, :, dims.shape[2] :] = 0

    def import_block(self, index: int, data: NDArray[np.uint8]) -> None:
        """See `SavedRows`; torch.OutOfMemoryError where the GPU has no more."""
        super().import_block(index, data)
        for layer, keys, values in self._gpu_parts(data):
            flat = values.transpose(0, 2, 1, 3).reshape(len(values), BLOCK_TOKENS, -1)
            told = keys.transpose(0, 2, 1), flat[..., : self.layout.layers[layer].value_length]
            self._pool.write(layer, self.blocks[index - self.ram_blocks], *told)

    def _put(self, layer: int, piece: int, blocks: list[int]) -> None:
        """Copies a layer's keys and values from blocks of the pool to chunks, from a piece's on."""
        keys, values = self._pool.read(layer, blocks)
        layout, chunks = self.layout.layers[layer], self.layer_chunks(layer)[piece:]
        layout.pack_keys(chunks, keys)
        layout.pack_values(chunks, values)

    def _bring_last_piece(self) -> None:
        """The last piece in RAM goes to the GPU again: a pass writes behind some of its tokens."""
        piece = self.ram_pieces - 1
        blocks = self._pool.take(PIECE_BLOCKS)
        for layer in self._pool.layers:
            layout, chunks = self.layout.layers[layer], self.layer_chunks(layer)[piece : piece + 1]
            rows = layout.unpack_keys(chunks, PIECE_TOKENS), layout.unpack_values(chunks, PIECE_TOKENS)
            for number, block in enumerate(blocks):
                part = slice(number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
                self._pool.write(layer, block, rows[0][:, part], rows[1][:, part])
        self.blocks[:0] = blocks
        self.ram_pieces = piece

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
