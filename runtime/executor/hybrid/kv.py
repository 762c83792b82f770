"""The keys and values of one sequence of a hybrid model: layers of the CPU in RAM, layers of the GPU in its pool.

Of the latter the first pieces may lie in RAM too, in chunks as those of the CPU's layers, and as those go on to flash;
new tokens are always put on the GPU. Knows nothing about models. Invariants: as for `ProgramKV`, on both devices, and
saved rows are the same bytes; a pass finds all tokens from the piece that it begins in on the GPU; layers of the pool
have chunks for what lies in RAM alone; blocks go back when a sequence is forgotten.
"""

import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from cpu_kernels.kv_layout import PIECE_BLOCKS, PIECE_TOKENS, KVLayout, pieces_of
from cpu_kernels.kv_policy import KVPolicy
from offload.errors import SequenceError
from runtime.executor.hybrid.kv_blocks import Bytes
from runtime.executor.hybrid.kv_pool import KVPool, blocks_of
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_groups import LayerGroup
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
        policy: KVPolicy | None = None,
        tiers: KVTiers | None = None,
    ) -> None:
        """`policy`: that of the pool's layouts. ValueError for a capacity below 1."""
        super().__init__(layers, kv_heads, key_length, value_length, capacity_tokens, policy, tiers)
        self.blocks: list[int] = []
        self.ram_pieces = 0
        self._pool = pool
        if pool.layers:  # of which each may have other pieces in RAM
            self.groups = tuple(LayerGroup((layer,)) for layer in range(layers))
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
        with self._pool.lock:
            if self.ram_tokens > start:
                self._forget_from(start)
            if self.ram_tokens > start:
                self._bring_last_piece()
        super().prepare(start, stop)
        if not self._pool.layers:
            return
        with self._pool.lock:
            lacking = blocks_of(stop) - self.ram_blocks - len(self.blocks)
            if lacking > 0:
                self.blocks.extend(self._take(lacking))

    @property
    def movable_pieces(self) -> int:
        """See `Holder`."""
        return max(min(self.settled_tokens // PIECE_TOKENS - self.ram_pieces, len(self.blocks) // PIECE_BLOCKS), 0)

    def move_piece(self) -> None:
        """See `Holder`; SequenceError where RAM has no room."""
        try:
            for layer in self._pool.layers:
                self._bring_piece(layer, self.ram_pieces)
        except SequenceError:
            self._cut_pool_layers()
            raise
        self._pool.give(self.blocks[:PIECE_BLOCKS])
        del self.blocks[:PIECE_BLOCKS]
        self.ram_pieces += 1

    def truncate(self, length: int) -> None:
        """See `ProgramKV`."""
        super().truncate(length)
        self._forget_from(length)

    def share(self, other: ProgramKV, length: int) -> int:
        """See `ProgramKV`; nothing where layers lie on the GPU: a pool's blocks are not shared."""
        return 0 if self._pool.layers else super().share(other, length)

    def bring_to_ram(self, layer: int) -> None:
        """Copies a layer's keys and values from the pool to RAM, those of a call that is not yet over too.

        SequenceError where RAM has no room.
        """
        for piece in range(self.ram_pieces, self.pieces):
            self._bring_piece(layer, piece)

    def leave_on_gpu(self, layer: int) -> None:
        """Forgets what `bring_to_ram` has copied of a layer."""
        self._cut_layer(layer, self.ram_pieces)

    def export_block(self, index: int, out: Bytes) -> None:
        """See `SavedRows`."""
        super().export_block(index, out)
        place = index - self.ram_blocks
        if place >= 0:
            for layer, rows in self._gpu_parts(out):
                self._pool.read(layer, self.blocks[place : place + 1], [rows])

    def import_block(self, index: int, data: Bytes) -> None:
        """See `SavedRows`; torch.OutOfMemoryError where the GPU has no more."""
        with self._arrivals.lock:  # so that the block stays on the GPU meanwhile
            super().import_block(index, data)
            for layer, rows in self._gpu_parts(data):
                self._pool.write(layer, self.blocks[index - self.ram_blocks], *rows)

    def _bring_piece(self, layer: int, piece: int) -> None:
        """Copies a layer's next piece from the pool to a chunk, as far as it has blocks; SequenceError."""
        layout, first = self.layout.layers[layer], (piece - self.ram_pieces) * PIECE_BLOCKS
        chunk = self.tiers.new(self, layout.chunk_bytes)
        blocks = self.blocks[first : first + PIECE_BLOCKS]
        self._pool.read(layer, blocks, _rows_of(layout, self._store.read(chunk))[: len(blocks)])
        self.chunks(layer).append(chunk)

    def _bytes_of(self, layer: int, piece: int) -> Bytes:
        """Those of a piece that lies on the GPU belong to nothing."""
        if piece < len(self.chunks(layer)):
            return super()._bytes_of(layer, piece)
        return np.zeros(self.layout.layers[layer].chunk_bytes, np.uint8)

    def _take(self, count: int) -> list[int]:
        """Blocks of the pool; SequenceError of this sequence where others' pieces find no room in RAM."""
        try:
            return self._pool.take(count)
        except SequenceError as error:
            raise SequenceError(str(error), kv=self, kept_tokens=self.length, hint=error.hint) from error

    def _lies_here(self, layer: int) -> bool:
        return layer not in self._pool.layers

    @property
    def _piece_bytes(self) -> int:
        return sum(layout.chunk_bytes for layer, layout in enumerate(self.layout.layers) if self._lies_here(layer))

    def _forget_from(self, length: int) -> None:
        """What layers of the pool hold behind the first `length` tokens is not needed."""
        self.ram_pieces = min(self.ram_pieces, pieces_of(length))
        self._cut_pool_layers()
        kept = max(blocks_of(length) - self.ram_blocks, 0)
        self._pool.give(self.blocks[kept:])
        del self.blocks[kept:]

    def _cut_pool_layers(self) -> None:
        for layer in self._pool.layers:
            self._cut_layer(layer, self.ram_pieces)

    def _bring_last_piece(self) -> None:
        """The last piece in RAM goes to the GPU again: a pass writes behind some of its tokens. SequenceError."""
        piece = self.ram_pieces - 1
        blocks = self._take(PIECE_BLOCKS)
        for layer in self._pool.layers:
            chunk = self.tiers.read(self, piece, self.chunks(layer)[piece])
            for block, rows in zip(blocks, _rows_of(self.layout.layers[layer], chunk), strict=True):
                self._pool.write(layer, block, *rows)
        self.blocks[:0] = blocks
        self.ram_pieces = piece
        self._cut_pool_layers()

    def _gpu_parts(self, data: Bytes) -> Iterator[tuple[int, tuple[Bytes, Bytes]]]:
        """Layers of the pool, with their keys and values (kv_heads, bytes of a block) in a block's bytes; views."""
        start = 0
        for layer, layout in enumerate(self.layout.layers):
            middle, stop = start + layout.kv_heads * layout.key_block_bytes, start + layout.block_bytes
            if layer in self._pool.layers:
                parts = (data[start:middle], data[middle:stop])
                yield layer, (parts[0].reshape(layout.kv_heads, -1), parts[1].reshape(layout.kv_heads, -1))
            start = stop


def bring_all_to_ram(caches: Sequence[HybridKV], layer: int) -> None:
    """Copies a layer of all sequences, see `bring_to_ram`; SequenceError where one finds no room: all stay then."""
    try:
        for kv in caches:
            kv.bring_to_ram(layer)
    except SequenceError:
        for kv in caches:
            kv.leave_on_gpu(layer)
        raise


def _rows_of(layout: KVLayout, chunk: Bytes) -> list[tuple[Bytes, Bytes]]:
    """Keys and values (kv_heads, bytes of a block) of a chunk's blocks; views."""
    keys, values = layout.keys_of(chunk), layout.values_of(chunk)
    return [(keys[:, block], values[:, block]) for block in range(PIECE_BLOCKS)]


def _give_back(pool: KVPool, blocks: list[int]) -> None:
    pool.give(blocks)
    blocks.clear()
