"""The keys and values of one sequence as the attention kernels want them: chunks, and a table of where they lie.

Knows nothing of models. Chunks are taken when needed, may be shared with other sequences until they are written to, and
may lie on flash (`kv_tiers`). Invariant: every layer holds the first `length` tokens; what lies behind them is never
used, so that a pass which fails half way changes nothing.
"""

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS, PIECE_TOKENS, KVMemory, pieces_of
from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.program import aligned_int64
from offload.kv_chunks import Chunk, ChunkStore
from runtime.executor.program.kv_abstracts import KVAbstracts
from runtime.executor.program.kv_groups import layer_groups, pairs_by_layer
from runtime.executor.program.kv_rows import Arrivals, export_block, import_block, rows_layout
from runtime.executor.program.kv_tiers import KVTiers
from runtime.executor.program.kv_windows import KVWindows
from runtime.executor.program.sequence_layout import choosing_layout, sequence_layout
from runtime.executor.saved_rows import RowsLayout


class ProgramKV:
    """Keys and values of up to `capacity_tokens` tokens in `layers` layers, in the types that `policy` says.

    The table of chunks is for a power of two of blocks, so that few programs serve sequences of every capacity. Memory
    is in small pages: huge ones made decode no faster. Types that wait for a full block have a window beside it, in
    which the newest keys lie in float16. The window of the last two blocks is kept between steps; where it is gone,
    `truncate` takes whole blocks alone (`cut_at`).
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        key_length: int,
        value_length: int,
        capacity_tokens: int,
        policy: KVPolicy | None = None,
        tiers: KVTiers | None = None,
    ) -> None:
        """ValueError for a capacity below 1."""
        if capacity_tokens < 1:
            raise ValueError(f"a KV cache of {capacity_tokens} tokens")
        self.capacity_tokens = capacity_tokens
        self.length = 0
        blocks = -(-capacity_tokens // BLOCK_TOKENS)
        reserved_tokens = BLOCK_TOKENS << (blocks - 1).bit_length()
        self.policy = policy or KVPolicy()
        self.layout = sequence_layout(self.policy, layers, kv_heads, key_length, value_length, reserved_tokens)
        self.choosing = choosing_layout(self.layout, self.policy.budget_tokens)
        self.abstracts = None if self.layout.abstracts is None else KVAbstracts(self.layout.abstracts)
        self.tiers = tiers or KVTiers()
        self.groups = layer_groups(self.layout, self.tiers.windows)  # of layers whose chunks go to flash together
        self._pairs = pairs_by_layer(self.layout, self.groups)
        self._store = self.tiers.store
        self._chunks: list[list[Chunk]] = [[] for _ in range(layers)]  # of every layer that lies here as many
        self._pieces = 0  # that those have
        self._own_from = 0  # the first piece from which on chunks are this sequence's alone, and not on flash
        self._settled = 0  # tokens that are there and that no pass under way writes
        self._table = aligned_int64(layers * self.layout.layers[0].pieces).reshape(layers, -1)
        self._table_version = -1
        self._windows = KVWindows(self.layout)
        self._arrivals = Arrivals()
        self.tiers.add(self)
        weakref.finalize(self, _let_go, self._store, self._chunks).atexit = False

    @property
    def table_address(self) -> int:
        """Of the table of chunks: int64 (layers, pieces); right after `place`."""
        return int(self._table.ctypes.data)

    @property
    def window_address(self) -> int:
        """Of the first window."""
        return self._windows.address

    @property
    def num_bytes(self) -> int:
        """Bytes of `capacity_tokens` tokens, between two steps."""
        rows_bytes = sum(layout.token_bytes for layout in self.layout.layers) * self.capacity_tokens
        index = 0 if self.layout.abstracts is None else self.layout.abstracts.num_bytes
        return rows_bytes + self._windows.num_bytes + index * self.capacity_tokens // self.layout.capacity_tokens

    @property
    def pieces(self) -> int:
        """Pieces that there are chunks for."""
        return self._pieces

    @property
    def settled_tokens(self) -> int:
        """The first tokens, which are there and which no pass under way writes."""
        return self._settled

    def settled_pieces(self, layer: int) -> int:
        """The first chunks of a layer, which are full and which no pass under way writes."""
        return min(self._settled // PIECE_TOKENS, len(self._chunks[layer]))

    def prepare(self, start: int, stop: int) -> None:
        """Before a pass puts tokens `start` to `stop` - 1 here: their chunks are in RAM, and this sequence's alone.

        SequenceError where there is no room, or what lies on flash cannot be read.
        """
        self._settled, first, pieces = start, start // PIECE_TOKENS, pieces_of(stop)
        while first < self._own_from or pieces > self.pieces:
            shared = max(min(self._own_from, self.pieces) - first, 0)
            self.tiers.make_room(self, (max(pieces - self.pieces, 0) + shared) * self._piece_bytes)
            try:
                self._own(first, start)
                self._hold(pieces)
            except MemoryError as error:
                self._cut(self._pieces)
                self.tiers.give_way(self, error)

    def place(self) -> None:
        """Writes to the table where chunks are; those on flash alone have the address 0."""
        if self._table_version != self._store.version:
            self._table_version = self._store.version
            for row, chunks in zip(self._table, self._chunks, strict=True):
                row[: len(chunks)] = [chunk.address for chunk in chunks]

    def point(self, layer: int, piece: int, address: int) -> None:
        """Writes to the table where a chunk is during the next pass alone."""
        self._table[layer, piece] = address
        self._table_version = -1

    def chunks(self, layer: int) -> list[Chunk]:
        """Of a layer's pieces."""
        return self._chunks[layer]

    def share(self, other: "ProgramKV", length: int) -> int:
        """This empty cache holds the first tokens of another of the same layout from now on: so many, at most `length`.

        Of types with a window only whole blocks are shared. ValueError for a cache of another executor or layout.
        """
        if other.tiers is not self.tiers or other.policy != self.policy or self.pieces:
            raise ValueError("only an empty KV cache of the same kind can share what another holds")
        length = min(length, other.length, self.capacity_tokens)
        if self._windows.exist:
            length = length // BLOCK_TOKENS * BLOCK_TOKENS
        pieces = pieces_of(length)
        for mine, its in zip(self._chunks, other._chunks, strict=True):
            mine.extend(self._store.share(chunk) for chunk in its[:pieces])
        self._pieces = self._own_from = pieces
        other._own_from = max(other._own_from, pieces)
        self.length = self._settled = length
        self._windows.begin(length)
        self._table_version = -1
        if self.abstracts is not None and other.abstracts is not None:
            self.abstracts.take(other.abstracts, length // BLOCK_TOKENS)
        return length

    def save(self, piece: int, layers: Sequence[int] | None = None) -> None:
        """Has a settled piece of some layers, or of all, written to flash soon."""
        self._own_from = max(self._own_from, piece + 1)
        for layer in range(len(self._chunks)) if layers is None else layers:
            self._store.save(self._chunks[layer][piece], self._pairs.get(layer))

    def evict(self, piece: int, layers: Sequence[int] | None = None) -> None:
        """Leaves it on flash alone; FlashError where that failed."""
        self.save(piece, layers)
        for layer in range(len(self._chunks)) if layers is None else layers:
            self._store.evict(self._chunks[layer][piece])

    def cut_at(self, length: int) -> int:
        """See `WindowedKV`."""
        return self._windows.cut_at(length)

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on; ValueError below 0, above `self.length`, or not where it can be cut."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncating a KV cache of {self.length} tokens to {length}")
        if self.cut_at(length) != length:
            raise ValueError(f"keys before token {length} are no longer as they were; cut at {self.cut_at(length)}")
        self.length = length
        self._settled = min(self._settled, length)
        self._windows.cut(length)
        self._cut(pieces_of(length))

    def grow(self, length: int) -> None:
        """The first `length` tokens are held from now on: a pass has put them there."""
        self.length = self._settled = length
        self._windows.grow(length)

    def _own(self, first: int, start: int) -> None:
        """Chunks from piece `first` on are this sequence's alone; of those behind token `start` nothing is needed."""
        for chunks in self._chunks:
            for piece in range(first, min(self._own_from, len(chunks))):
                if piece * PIECE_TOKENS < start:
                    chunks[piece] = self.tiers.writable(self, piece, chunks[piece])
                else:
                    chunks[piece] = self._store.replaced(chunks[piece])
        self._own_from = min(self._own_from, first)

    def _hold(self, pieces: int) -> None:
        """There are chunks for so many pieces."""
        for layer, chunks in enumerate(self._chunks):
            while self._lies_here(layer) and len(chunks) < pieces:
                chunks.append(self._store.new(self.layout.layers[layer].chunk_bytes))
        self._pieces = max(self._pieces, pieces)

    def _lies_here(self, layer: int) -> bool:
        """Whether every piece of a layer has a chunk."""
        return True

    @property
    def _piece_bytes(self) -> int:
        """Of the chunks that a new piece takes."""
        return self.layout.piece_bytes

    def _cut(self, pieces: int) -> None:
        """There are chunks for no more than so many pieces."""
        for layer in range(len(self._chunks)):
            self._cut_layer(layer, pieces)
        self._pieces = min(self._pieces, pieces)

    def _cut_layer(self, layer: int, pieces: int) -> None:
        chunks = self._chunks[layer]
        for chunk in chunks[pieces:]:
            self._store.drop(chunk)
        del chunks[pieces:]

    @property
    def rows_layout(self) -> RowsLayout:
        """See `SavedRows`: layer after layer keys, then values, as they lie here."""
        return rows_layout(self.policy, self.layout.layers)

    @property
    def final_tokens(self) -> int:
        """See `SavedRows`."""
        return self.length // BLOCK_TOKENS * BLOCK_TOKENS if self._windows.exist else self.length

    @property
    def blocks_at_once(self) -> int | None:
        """See `SavedRows`: what has not come as a whole piece cannot go to flash."""
        return PIECE_BLOCKS if self.tiers.spills else None

    def export_block(self, index: int, out: NDArray[np.uint8]) -> None:
        """See `SavedRows`."""
        export_block(self._parts(index), out)

    def import_block(self, index: int, data: NDArray[np.uint8]) -> None:
        """See `SavedRows`; SequenceError where there is no room."""
        with self._arrivals.lock:
            start = max(self.length // BLOCK_TOKENS, self._arrivals.first)
            self.prepare(min(start, index) * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        import_block(self._parts(index), data)
        self._arrivals.add(index, start)

    def restored(self, length: int) -> None:
        """See `SavedRows`; ValueError above the capacity."""
        if length > self.capacity_tokens:
            raise ValueError(f"{length} tokens in a KV cache of {self.capacity_tokens}")
        if length > self.length:  # their windows were not brought
            self._windows.begin(length)
        self._hold(pieces_of(length))
        self._index(self.length // BLOCK_TOKENS, length // BLOCK_TOKENS)
        self.length = self._settled = length
        self._arrivals = Arrivals()

    def _index(self, first: int, last: int) -> None:
        """Works out the abstracts of full blocks that no pass has put here, piece after piece."""
        table = np.zeros((len(self._chunks), self.layout.layers[0].pieces), np.int64)
        rows = zip(self.layout.layers, table, strict=True)
        memories = [KVMemory(layout, int(row.ctypes.data)) for layout, row in rows]
        while self.abstracts is not None and first < last:
            piece = first // PIECE_BLOCKS
            held = [self._store.read(chunks[piece]) for chunks in self._chunks]
            table[:, piece] = [chunk.ctypes.data for chunk in held]
            end = min((piece + 1) * PIECE_BLOCKS, last)
            self.abstracts.rebuild(memories, first, end)
            first = end

    def layer_chunks(self, layer: int) -> list[NDArray[np.uint8]]:
        """The bytes of a layer's chunks: those in RAM, or copies of what is on flash; FlashError."""
        return [self._store.read(chunk) for chunk in self._chunks[layer]]

    def _parts(self, index: int) -> Iterator[NDArray[np.uint8]]:
        """Of a block keys, then values of every layer: (heads, bytes of a block) each; views."""
        piece, block = divmod(index, PIECE_BLOCKS)
        if piece >= self.pieces:
            raise ValueError(f"a block of tokens from {index * BLOCK_TOKENS} on in a KV cache of {self.length}")
        for layer, layout in enumerate(self.layout.layers):
            chunk = self._bytes_of(layer, piece)
            yield layout.keys_of(chunk)[:, block]
            yield layout.values_of(chunk)[:, block]

    def _bytes_of(self, layer: int, piece: int) -> NDArray[np.uint8]:
        """Of a chunk, as `layer_chunks` has them."""
        return self._store.read(self._chunks[layer][piece])


def _let_go(store: ChunkStore, layers: list[list[Chunk]]) -> None:
    for chunks in layers:
        for chunk in chunks:
            store.drop(chunk)
        chunks.clear()
