"""How keys and values lie in memory for the attention kernels, in float16.

Tokens come in blocks of 64, eight blocks in a piece of 512. Pieces lie one after the other, so that memory is touched
only as far as a cache is filled; within one, KV heads lie one after the other, so that a head is read in runs of eight
blocks. A head's block of keys is (key_length, 64 tokens): one vector holds the same dimension of neighbouring tokens
and scores need no sum across lanes. Its block of values is (value tiles, 64 tokens, 32 dimensions), the last tile
filled up. Memory that holds no token is never used, only read: it may hold anything. Knows nothing about layers or
models.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.program import Field

BLOCK_TOKENS = 64
PIECE_TOKENS = 512
PIECE_BLOCKS = PIECE_TOKENS // BLOCK_TOKENS
TILE_DIMS = 32
HALF_BYTES = 2


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The keys and values of one layer of one sequence."""

    kv_heads: int
    key_length: int
    value_length: int
    capacity_tokens: int

    def __post_init__(self) -> None:
        if min(self.kv_heads, self.key_length, self.value_length, self.capacity_tokens) < 1:
            raise ValueError(f"{self}: every number must be at least 1")

    @property
    def pieces(self) -> int:
        """Pieces of tokens."""
        return -(-self.capacity_tokens // PIECE_TOKENS)

    @property
    def value_tiles(self) -> int:
        """Tiles of 32 dimensions that hold a value."""
        return -(-self.value_length // TILE_DIMS)

    @property
    def key_bytes(self) -> int:
        """Bytes of all keys; they should start on a multiple of 64."""
        return self.pieces * self.kv_heads * PIECE_TOKENS * self.key_length * HALF_BYTES

    @property
    def value_bytes(self) -> int:
        """Bytes of all values; they should start on a multiple of 64."""
        return self.pieces * self.kv_heads * PIECE_TOKENS * self.value_tiles * TILE_DIMS * HALF_BYTES

    def unpack_keys(self, keys: NDArray[np.uint8], tokens: int) -> NDArray[np.float16]:
        """(kv_heads, tokens, key_length) of the first tokens."""
        shape = (self.pieces, self.kv_heads, PIECE_BLOCKS, self.key_length, BLOCK_TOKENS)
        blocks = keys.view(np.float16).reshape(shape).transpose(1, 0, 2, 4, 3)
        return blocks.reshape(self.kv_heads, -1, self.key_length)[:, :tokens]

    def unpack_values(self, values: NDArray[np.uint8], tokens: int) -> NDArray[np.float16]:
        """(kv_heads, tokens, value_length) of the first tokens."""
        shape = (self.pieces, self.kv_heads, PIECE_BLOCKS, self.value_tiles, BLOCK_TOKENS, TILE_DIMS)
        tiles = values.view(np.float16).reshape(shape).transpose(1, 0, 2, 4, 3, 5)
        return tiles.reshape(self.kv_heads, -1, self.value_tiles * TILE_DIMS)[:, :tokens, : self.value_length]


@dataclass(frozen=True, slots=True)
class KVMemory:
    """Where keys and values of a layout lie: two addresses."""

    layout: KVLayout
    keys: Field
    values: Field
