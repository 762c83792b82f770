"""How keys and values lie in memory for the attention kernels, in float16 or one of the smaller types (`kv_types`).

Tokens come in blocks of 64, eight blocks in a piece of 512. What a layer holds of a piece is a *chunk*: its keys, then
its values, in either KV heads one after the other, so that a head is read in runs of eight blocks. A chunk takes whole
pages and may lie anywhere: a table tells the address of every piece's. A head's block of keys is (key_length, 64
tokens): one vector holds the same dimension of neighboring tokens and scores need no sum across lanes. Its block of
values is (value tiles, 64 tokens, 32 dimensions), the last tile filled up. Memory that holds no token is never used,
only read: it may hold anything. Knows nothing about layers or models.

Coded numbers lie in the same order, in pairs of bytes: two neighboring dimensions of a key, two neighboring tokens of a
value. A byte of 4 or 2 bits of a key holds dimensions two apart, the first in its low bits; one of a value dimensions
16 or 8 apart. Scales, then minima, follow a block's numbers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_types import BLOCK_TOKENS, HALF_BYTES, TILE_DIMS, KVType
from cpu_kernels.program import Field

__all__ = ["BLOCK_TOKENS", "HALF_BYTES", "PIECE_BLOCKS", "PIECE_TOKENS", "TILE_DIMS", "KVLayout", "KVMemory"]

Bytes = NDArray[np.uint8]

PIECE_TOKENS = 512
PIECE_BLOCKS = PIECE_TOKENS // BLOCK_TOKENS
CHUNK_PAGE_BYTES = 4096  # of a drive's block and of most systems' pages


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The keys and values of one layer of one sequence.

    `rotates_keys`, `rotates_values`: heads are turned by a Walsh-Hadamard matrix on their way in, so that no channel
    stands out when numbers are rounded; queries are turned with the keys, and what attention yields is turned back.
    """

    kv_heads: int
    key_length: int
    value_length: int
    capacity_tokens: int
    key_type: KVType = KVType.F16
    value_type: KVType = KVType.F16
    rotates_keys: bool = False
    rotates_values: bool = False

    def __post_init__(self) -> None:
        if min(self.kv_heads, self.key_length, self.value_length, self.capacity_tokens) < 1:
            raise ValueError(f"{self}: every number must be at least 1")
        for turns, length in ((self.rotates_keys, self.key_length), (self.rotates_values, self.value_length)):
            if turns and not can_rotate(length):
                raise ValueError(f"{self}: heads of {length} cannot be turned: not a power of two")

    @property
    def pieces(self) -> int:
        """Pieces of tokens."""
        return -(-self.capacity_tokens // PIECE_TOKENS)

    @property
    def key_block_bytes(self) -> int:
        """Bytes of a head's block of keys."""
        return self.key_type.key_block_bytes(self.key_length)

    @property
    def value_block_bytes(self) -> int:
        """Bytes of a head's block of values."""
        return self.value_type.value_block_bytes(self.value_length)

    @property
    def values_start(self) -> int:
        """Where a chunk's values begin."""
        return self.kv_heads * PIECE_BLOCKS * self.key_block_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, which begins on a page: whole pages."""
        needed = self.values_start + self.kv_heads * PIECE_BLOCKS * self.value_block_bytes
        return -(-needed // CHUNK_PAGE_BYTES) * CHUNK_PAGE_BYTES

    @property
    def has_window(self) -> bool:
        """Whether the newest keys lie in a window of their own, in float16, until their block is full."""
        return self.key_type.has_minimum

    @property
    def window_bytes(self) -> int:
        """Bytes of the window's addresses: those of all keys in float16, or 0. Few of them hold anything at a time."""
        if not self.has_window:
            return 0
        return self.pieces * self.kv_heads * PIECE_BLOCKS * KVType.F16.key_block_bytes(self.key_length)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of all heads' keys and values."""
        return self.kv_heads * (self.key_block_bytes + self.value_block_bytes)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, its share of scales included and the window aside."""
        return self.block_bytes // BLOCK_TOKENS

    def keys_of(self, chunk: Bytes) -> Bytes:
        """(kv_heads, blocks, bytes of a block) of a chunk's keys: a view."""
        return chunk[: self.values_start].reshape(self.kv_heads, PIECE_BLOCKS, self.key_block_bytes)

    def values_of(self, chunk: Bytes) -> Bytes:
        """(kv_heads, blocks, bytes of a block) of a chunk's values: a view."""
        shape = (self.kv_heads, PIECE_BLOCKS, self.value_block_bytes)
        return chunk[self.values_start :][: self.kv_heads * PIECE_BLOCKS * self.value_block_bytes].reshape(shape)


@dataclass(frozen=True, slots=True)
class KVMemory:
    """Where chunks of a layout lie, and the window of keys where it has one.

    `table`: the address of int64 (pieces,), the addresses of chunks. `window`: the address of all keys in float16,
    piece after piece.
    """

    layout: KVLayout
    table: Field
    window: Field = 0


def can_rotate(length: int) -> bool:
    """Whether there is a Walsh-Hadamard matrix for heads of that length."""
    return length & (length - 1) == 0


def pieces_of(total_tokens: int) -> int:
    """Pieces that hold a context of that many tokens."""
    return -(-total_tokens // PIECE_TOKENS)
