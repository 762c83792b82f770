"""Blocks of keys and values read as vectors, as parts of kernels: what differs between the cache's types.

float16 and bfloat16 come as float32. Codes come as 16-bit integers, two neighboring terms of a sum in every lane of 32
bits, without their scales. `kv_layout` says where what lies. Knows nothing about attention.
"""

from dataclasses import dataclass

from cpu_kernels.kv_types import BLOCK_TOKENS, HALF_BYTES, PAIR, TILE_DIMS, KVType
from cpu_kernels.simd import I8, I16, I32, Kernel, Value, vector_type


@dataclass(frozen=True, slots=True)
class KeyReader:
    """Blocks of keys of `length` dimensions: vectors of neighboring tokens."""

    k: Kernel
    kind: KVType
    length: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.kind.key_block_bytes(self.length)

    @property
    def token_bytes(self) -> int:
        """Bytes from one token of a step to the next."""
        return PAIR if self.kind.is_coded else HALF_BYTES

    @property
    def step_bytes(self) -> int:
        """Bytes from one step to the next."""
        return BLOCK_TOKENS * self.token_bytes

    def floats(self, step: Value, tokens: list[int]) -> list[Value]:
        """One dimension of the vectors that begin at `tokens`; not of coded types."""
        return [wide(self.k, step + self.token_bytes * token, self.kind) for token in tokens]

    def codes(self, step: Value, tokens: list[int]) -> list[list[Value]]:
        """For every pair of a step's dimensions the vectors that begin at `tokens`."""
        loaded = [_bytes(self.k, step + self.token_bytes * token, self.kind) for token in tokens]
        return [[field(word, self.kind, part) for word in loaded] for part in range(self.kind.codes_a_byte)]

    def scales(self, block: Value, group: int, token: int) -> Value:
        """Those of the tokens from `token` on for a group of dimensions, where tokens have their own."""
        at = self.kind.key_codes_bytes(self.length) + HALF_BYTES * (group * BLOCK_TOKENS + token)
        return wide(self.k, block + at, KVType.F16)

    def channel_scales(self, block: Value) -> tuple[Value, Value]:
        """Addresses of scales and minima (float16) of all channels, where channels have their own."""
        at = self.kind.key_codes_bytes(self.length)
        return block + at, block + (at + self.kind.key_scales_bytes(self.length))


@dataclass(frozen=True, slots=True)
class ValueReader:
    """Blocks of values of `length` dimensions: vectors of neighboring dimensions."""

    k: Kernel
    kind: KVType
    length: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.kind.value_block_bytes(self.length)

    @property
    def step_tokens(self) -> int:
        """Tokens that one step reads."""
        return PAIR if self.kind.is_coded else 1

    @property
    def step_bytes(self) -> int:
        """Bytes from one step of a tile to the next."""
        return self.step_tokens * self.kind.value_tile_bytes

    def places(self, dims: list[int]) -> list[int]:
        """Offsets from a step's first tile to where the vectors of `dims` lie."""
        tile_bytes = BLOCK_TOKENS * self.kind.value_tile_bytes
        return [dim // TILE_DIMS * tile_bytes + self._within(dim % TILE_DIMS) for dim in dims]

    def floats(self, step: Value, dims: list[int]) -> list[Value]:
        """The vectors that begin at `dims` of a token; not of coded types."""
        return [wide(self.k, step + place, self.kind) for place in self.places(dims)]

    def codes(self, step: Value, dims: list[int]) -> list[Value]:
        """The vectors that begin at `dims` of two tokens."""
        loaded: dict[int, Value] = {}
        for place in self.places(dims):
            if place not in loaded:
                loaded[place] = self._repeated(step + place)
        return [self._field(loaded[place], dim) for place, dim in zip(self.places(dims), dims, strict=True)]

    def scales(self, block: Value, group: int, token: int) -> Value:
        """Those of the tokens from `token` on for a group of dimensions."""
        at = self.kind.value_codes_bytes(self.length) + HALF_BYTES * (group * BLOCK_TOKENS + token)
        return wide(self.k, block + at, KVType.F16)

    def minima(self, block: Value, group: int, token: int) -> Value:
        """The same for minima."""
        return self.scales(block + self.kind.value_scales_bytes(self.length), group, token)

    def _within(self, dim: int) -> int:
        """The offset of a dimension within a tile's step."""
        if not self.kind.is_coded:
            return dim * HALF_BYTES
        return dim % self.kind.value_tile_bytes * PAIR

    def _repeated(self, place: Value) -> Value:
        """A vector of words from bytes of which a tile may have fewer than a vector has lanes."""
        lanes = min(self.k.lanes, self.kind.value_tile_bytes)
        words = _bytes(self.k, place, self.kind, lanes)
        return words if lanes == self.k.lanes else words.shuffle([*range(PAIR * lanes)] * (self.k.lanes // lanes))

    def _field(self, words: Value, dim: int) -> Value:
        kind, tile_bytes = self.kind, self.kind.value_tile_bytes
        first = dim % TILE_DIMS // tile_bytes
        if self.k.lanes <= tile_bytes:
            return field(words, kind, first)
        shifts = [kind.bits * (first + lane // PAIR // tile_bytes) for lane in range(PAIR * self.k.lanes)]
        return (words >> self.k.table(I16, shifts)) & ((1 << kind.bits) - 1)


def wide(k: Kernel, address: Value, kind: KVType) -> Value:
    """A vector of float16 or bfloat16 as float32."""
    bits = k.load(vector_type(I16, k.lanes), address)
    if kind is KVType.BF16:
        return (bits.extend(I32, signed=False) << 16).bitcast(k.floats)
    return k.half_to_float(bits)


def field(words: Value, kind: KVType, part: int) -> Value:
    """One of the codes in every byte, which lies in a word."""
    return words if kind.bits == 8 else (words >> kind.bits * part) & ((1 << kind.bits) - 1)


def _bytes(k: Kernel, address: Value, kind: KVType, lanes: int | None = None) -> Value:
    """Two bytes for each lane, as words."""
    bytes_ = k.load(vector_type(I8, PAIR * (k.lanes if lanes is None else lanes)), address)
    return bytes_.extend(I16, signed=kind.bits == 8)
