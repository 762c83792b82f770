"""How keys and values lie in memory for the attention kernels, in float16 or one of the smaller types (`kv_types`).

Tokens come in blocks of 64, eight blocks in a piece of 512. Pieces lie one after the other, so that memory is touched
only as far as a cache is filled; within one, KV heads lie one after the other, so that a head is read in runs of eight
blocks. A head's block of keys is (key_length, 64 tokens): one vector holds the same dimension of neighboring tokens
and scores need no sum across lanes. Its block of values is (value tiles, 64 tokens, 32 dimensions), the last tile
filled up. Memory that holds no token is never used, only read: it may hold anything. Knows nothing about layers or
models.

Coded numbers lie in the same order. A byte of keys holds one, two or four neighboring dimensions of a token, the first
in its low bits. 32 dimensions of a value are 32 bytes; or 16 with the second half in the high nibbles; or two words of
32 bits, a word's dimensions from its low bits up. Scales, then minima, follow a block's numbers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_types import BLOCK_TOKENS, HALF_BYTES, TILE_DIMS, KVType
from cpu_kernels.program import Field

__all__ = ["BLOCK_TOKENS", "HALF_BYTES", "PIECE_BLOCKS", "PIECE_TOKENS", "TILE_DIMS", "KVLayout", "KVMemory"]

PIECE_TOKENS = 512
PIECE_BLOCKS = PIECE_TOKENS // BLOCK_TOKENS


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
    def value_tiles(self) -> int:
        """Tiles of 32 dimensions that hold a value."""
        return -(-self.value_length // TILE_DIMS)

    @property
    def key_bytes(self) -> int:
        """Bytes of all keys; they should start on a multiple of 64."""
        return self.pieces * self.kv_heads * PIECE_BLOCKS * self.key_type.key_block_bytes(self.key_length)

    @property
    def value_bytes(self) -> int:
        """Bytes of all values; they should start on a multiple of 64."""
        return self.pieces * self.kv_heads * PIECE_BLOCKS * self.value_type.value_block_bytes(self.value_length)

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
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, its share of scales included and the window aside."""
        key = self.key_type.key_block_bytes(self.key_length)
        return self.kv_heads * (key + self.value_type.value_block_bytes(self.value_length)) // BLOCK_TOKENS

    def unpack_keys(self, keys: NDArray[np.uint8], tokens: int) -> NDArray[np.float16]:
        """(kv_heads, tokens, key_length) of the first tokens of float16 keys."""
        shape = (self.pieces, self.kv_heads, PIECE_BLOCKS, self.key_length, BLOCK_TOKENS)
        blocks = keys.view(np.float16).reshape(shape).transpose(1, 0, 2, 4, 3)
        return blocks.reshape(self.kv_heads, -1, self.key_length)[:, :tokens]

    def unpack_values(self, values: NDArray[np.uint8], tokens: int) -> NDArray[np.float16]:
        """(kv_heads, tokens, value_length) of the first tokens of float16 values."""
        shape = (self.pieces, self.kv_heads, PIECE_BLOCKS, self.value_tiles, BLOCK_TOKENS, TILE_DIMS)
        tiles = values.view(np.float16).reshape(shape).transpose(1, 0, 2, 4, 3, 5)
        return tiles.reshape(self.kv_heads, -1, self.value_tiles * TILE_DIMS)[:, :tokens, : self.value_length]

    def pack_keys(self, memory: NDArray[np.uint8], keys: NDArray[np.float16]) -> None:
        """Writes the keys of the first tokens, (kv_heads, tokens, key_length), where `unpack_keys` finds them."""
        shape = (self.pieces, self.kv_heads, PIECE_BLOCKS, self.key_length, BLOCK_TOKENS)
        blocks = memory.view(np.float16).reshape(shape)
        for first in range(0, keys.shape[1], BLOCK_TOKENS):
            piece, block = divmod(first // BLOCK_TOKENS, PIECE_BLOCKS)
            part = keys[:, first : first + BLOCK_TOKENS]
            blocks[piece, :, block, :, : part.shape[1]] = part.transpose(0, 2, 1)

    def pack_values(self, memory: NDArray[np.uint8], values: NDArray[np.float16]) -> None:
        """Writes the values of the first tokens, (kv_heads, tokens, value_length), where `unpack_values` finds them."""
        shape = (self.pieces, self.kv_heads, PIECE_BLOCKS, self.value_tiles, BLOCK_TOKENS, TILE_DIMS)
        tiles = memory.view(np.float16).reshape(shape)
        for first in range(0, values.shape[1], BLOCK_TOKENS):
            piece, block = divmod(first // BLOCK_TOKENS, PIECE_BLOCKS)
            part = values[:, first : first + BLOCK_TOKENS]
            for tile in range(self.value_tiles):
                dims = part[..., tile * TILE_DIMS : (tile + 1) * TILE_DIMS]
                tiles[piece, :, block, tile, : part.shape[1], : dims.shape[2]] = dims


@dataclass(frozen=True, slots=True)
class KVMemory:
    """Where keys and values of a layout lie, and the window of keys where it has one: addresses."""

    layout: KVLayout
    keys: Field
    values: Field
    window: Field = 0

    @property
    def new_keys(self) -> Field:
        """Where keys are put first."""
        return self.window if self.layout.has_window else self.keys


def can_rotate(length: int) -> bool:
    """Whether there is a Walsh-Hadamard matrix for heads of that length."""
    return length & (length - 1) == 0
