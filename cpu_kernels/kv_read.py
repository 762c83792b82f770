"""Blocks of keys and values read as float32 vectors, as parts of kernels: what differs between the cache's types.

A reader gives numbers without their scales, which are taken into the other factor of a product instead: that costs one
product for 32. `kv_layout` says where what lies. Knows nothing about attention.
"""

from dataclasses import dataclass

from cpu_kernels.kv_types import BLOCK_TOKENS, GROUP, HALF_BYTES, TILE_DIMS, KVType
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
    def step_dims(self) -> int:
        """Dimensions that one step reads."""
        return self.kind.codes_a_byte

    @property
    def step_bytes(self) -> int:
        """Bytes from one step to the next."""
        return BLOCK_TOKENS * (1 if self.kind.is_coded else HALF_BYTES)

    @property
    def token_bytes(self) -> int:
        """Bytes from one token of a step to the next."""
        return self.step_bytes // BLOCK_TOKENS

    def vectors(self, step: Value, tokens: list[int]) -> list[list[Value]]:
        """For every dimension of a step the vectors that begin at `tokens`."""
        k, kind = self.k, self.kind
        if not kind.is_coded:
            return [[wide(k, step + HALF_BYTES * token, kind) for token in tokens]]
        loaded = [k.load(vector_type(I8, k.lanes), step + token) for token in tokens]
        if kind.bits == 8:
            return [[vector.extend(I32, signed=True).to_float() for vector in loaded]]
        codes = [vector.extend(I32, signed=False) for vector in loaded]
        return [[_field(k, code, kind, part) for code in codes] for part in range(self.step_dims)]

    def scales(self, block: Value, group: int, token: int) -> Value:
        """Those of the tokens from `token` on for a group of dimensions, where tokens have their own."""
        at = self.kind.key_codes_bytes(self.length) + HALF_BYTES * (group * BLOCK_TOKENS + token)
        return wide(self.k, block + at, KVType.F16)

    def channel_scales(self, block: Value, half: int) -> tuple[Value, Value]:
        """Addresses of scales and minima (float16) of all channels for 32 tokens, where channels have their own."""
        at = self.kind.key_codes_bytes(self.length) + HALF_BYTES * half * self.length
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
    def token_bytes(self) -> int:
        """Bytes from one token of a tile to the next."""
        return self.kind.value_tile_bytes

    def places(self, dims: list[int]) -> list[int]:
        """Offsets from a token's first tile to where the vectors of `dims` lie."""
        tile_bytes = BLOCK_TOKENS * self.token_bytes
        return [dim // TILE_DIMS * tile_bytes + self._within(dim % TILE_DIMS) for dim in dims]

    def vectors(self, token: Value, dims: list[int]) -> list[Value]:
        """The vectors that begin at `dims` of the token whose first tile is at an address."""
        k, kind = self.k, self.kind
        places = self.places(dims)
        if not kind.is_coded:
            return [wide(k, token + place, kind) for place in places]
        if kind.bits == 8:
            bytes_ = vector_type(I8, k.lanes)
            return [k.load(bytes_, token + place).extend(I32, signed=True).to_float() for place in places]
        loaded: dict[int, Value] = {}
        for place in places:
            if place not in loaded:
                loaded[place] = self._codes(token + place)
        return [self._numbers(loaded[place], dim % TILE_DIMS) for place, dim in zip(places, dims, strict=True)]

    def scales(self, block: Value, tile: int, token: int) -> Value:
        """Those of the tokens from `token` on for a tile."""
        at = self.kind.value_codes_bytes(self.length) + HALF_BYTES * (tile * BLOCK_TOKENS + token)
        return wide(self.k, block + at, KVType.F16)

    def minima(self, block: Value, tile: int, token: int) -> Value:
        """The same for minima."""
        return self.scales(block + self.kind.value_scales_bytes(self.length), tile, token)

    def _within(self, dim: int) -> int:
        """The offset of a dimension within a tile's token."""
        if self.kind.bits == 4:
            return dim % (TILE_DIMS // 2)
        return dim // 16 * 4 if self.kind.bits == 2 else dim * self.kind.bits // 8

    def _codes(self, place: Value) -> Value:
        """What holds the numbers of one vector, or of two."""
        k = self.k
        if self.kind.bits == 2:
            return k.load_splat(I32, place)
        return k.load(vector_type(I8, k.lanes), place).extend(I32, signed=False)

    def _numbers(self, code: Value, dim: int) -> Value:
        k = self.k
        if self.kind.bits == 4:
            return _field(k, code, self.kind, dim // (TILE_DIMS // 2))
        shifts = k.table(I32, [2 * (dim % 16 + lane) for lane in range(k.lanes)])
        return ((code >> shifts) & 3).to_float()


def wide(k: Kernel, address: Value, kind: KVType) -> Value:
    """A vector of float16 or bfloat16 as float32."""
    bits = k.load(vector_type(I16, k.lanes), address)
    if kind is KVType.BF16:
        return (bits.extend(I32, signed=False) << 16).bitcast(k.floats)
    return k.half_to_float(bits)


def groups_of(length: int) -> list[tuple[int, int]]:
    """First dimension and count of each group of dimensions."""
    return [(first, min(GROUP, length - first)) for first in range(0, length, GROUP)]


def _field(k: Kernel, code: Value, kind: KVType, part: int) -> Value:
    """One of the numbers in every byte."""
    number: Value = (code >> kind.bits * part) & ((1 << kind.bits) - 1)
    return (number - 8 if kind is KVType.Q4_0 else number).to_float()
