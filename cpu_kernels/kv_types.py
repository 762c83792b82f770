"""The number types keys and values are kept in, and the bytes they take in blocks of 64 tokens.

A coded type keeps integers of few bits with float16 scales. `q8_0` and `q4_0` have a scale for 32 neighbouring channels
of a token, as llama.cpp's types of these names. `kivi4` and `kivi2` (KIVI, arXiv:2402.02750) have a scale and a minimum
as well: values for 64 or 32 channels of a token, keys for the 64 tokens that a block has of a channel, which is why a
block of such keys is coded only once it is full; until then its tokens are read from a window in float16. Knows nothing
about models or kernels.
"""

from enum import StrEnum

BLOCK_TOKENS = 64
TILE_DIMS = 32  # of a value side by side
GROUP = 32  # numbers that share a scale, where not more do
HALF_BYTES = 2
LINE_BYTES = 64
PAIR = 2  # integers of a sum's neighboring terms lie side by side, as dot products of 16-bit integers want them


class KVType(StrEnum):
    """By the names of llama.cpp's `-ctk` and `-ctv` where it has them."""

    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    KIVI4 = "kivi4"
    KIVI2 = "kivi2"

    @property
    def bits(self) -> int:
        """Of one number, scales aside."""
        return {"f16": 16, "bf16": 16, "q8_0": 8, "q4_0": 4, "kivi4": 4, "kivi2": 2}[self.value]

    @property
    def is_coded(self) -> bool:
        """Whether numbers are integers with scales."""
        return self.bits < 16

    @property
    def has_minimum(self) -> bool:
        """Whether a group has a minimum beside its scale; keys then share them along tokens."""
        return self in (KVType.KIVI4, KVType.KIVI2)

    @property
    def codes_a_byte(self) -> int:
        """Integers in a byte; 1 for numbers that are not coded."""
        return 8 // self.bits if self.is_coded else 1

    @property
    def step_dims(self) -> int:
        """Dimensions of a key that lie together: in two bytes where they are coded."""
        return PAIR * self.codes_a_byte if self.is_coded else 1

    @property
    def key_group(self) -> int:
        """Neighbouring channels of a token's key that share a scale, where tokens have their own."""
        return GROUP

    @property
    def value_group(self) -> int:
        """Neighbouring channels of a value that share a scale: whole tiles.

        kivi4 with groups of 32 took 0.320 of float16's bytes, with 64 it takes 0.281.
        """
        return 2 * GROUP if self is KVType.KIVI4 else GROUP

    @property
    def offset(self) -> int:
        """What is taken off a code to give the integer it stands for."""
        return 8 if self is KVType.Q4_0 else 0

    @property
    def highest(self) -> int:
        """The greatest integer: 7 and 127 of the symmetric types."""
        return (1 << self.bits) - 1 if self.has_minimum else (1 << self.bits - 1) - 1

    def key_codes_bytes(self, length: int) -> int:
        """Bytes of the numbers of a block of keys; scales follow, then minima."""
        step_bytes = PAIR if self.is_coded else HALF_BYTES
        return -(-length // self.step_dims) * BLOCK_TOKENS * step_bytes

    def key_scales_bytes(self, length: int) -> int:
        """Bytes of a block's scales of keys: (groups of channels, 64 tokens), or (channels,) with a minimum."""
        if not self.is_coded:
            return 0
        return HALF_BYTES * (length if self.has_minimum else -(-length // self.key_group) * BLOCK_TOKENS)

    def key_block_bytes(self, length: int) -> int:
        """Bytes of a head's block of keys: whole cache lines."""
        scales = self.key_scales_bytes(length) * (2 if self.has_minimum else 1)
        return -(-(self.key_codes_bytes(length) + scales) // LINE_BYTES) * LINE_BYTES

    @property
    def value_tile_bytes(self) -> int:
        """Bytes of 32 channels of a value, scales aside."""
        return TILE_DIMS * self.bits // 8

    def value_codes_bytes(self, length: int) -> int:
        """Bytes of the numbers of a block of values; scales (groups of channels, 64 tokens) follow, then minima."""
        return -(-length // TILE_DIMS) * BLOCK_TOKENS * self.value_tile_bytes

    def value_scales_bytes(self, length: int) -> int:
        """Bytes of the scales of a block of values."""
        return -(-length // self.value_group) * BLOCK_TOKENS * HALF_BYTES if self.is_coded else 0

    def value_block_bytes(self, length: int) -> int:
        """Bytes of a head's block of values: whole cache lines."""
        return self.value_codes_bytes(length) + self.value_scales_bytes(length) * (2 if self.has_minimum else 1)
