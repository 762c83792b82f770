"""Keys and values in blocks of tokens, and which blocks the sequences of a step use. Knows nothing about models."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVBlocks:
    """The keys and values of one layer, of all sequences: a pool of blocks of `block_tokens` tokens.

    `keys` (blocks, block_tokens, kv_heads, key_length) and `values` (..., value_length), contiguous, float16; or int8
    with `key_scales` and `value_scales` (blocks, block_tokens, kv_heads) float32: a number is code * scale, the scale
    being the greatest magnitude of a head's token / 127.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.keys.shape[:3]
        if self.keys.ndim != 4 or self.values.ndim != 4 or self.values.shape[:3] != shape:
            raise ValueError(f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)}")
        wanted = torch.float16 if self.key_scales is None else torch.int8
        if self.keys.dtype != wanted or self.values.dtype != wanted:
            raise TypeError(f"keys are {self.keys.dtype} and values {self.values.dtype}, not {wanted}")
        for scales in (self.key_scales, self.value_scales):
            if (scales is None) != (self.key_scales is None) or (scales is not None and scales.shape != shape):
                raise ValueError("int8 keys and values both have scales (blocks, block_tokens, kv_heads)")

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[1]

    @property
    def kv_heads(self) -> int:
        """Heads that have keys."""
        return self.keys.shape[2]

    @property
    def key_length(self) -> int:
        """Numbers of a key."""
        return self.keys.shape[3]

    @property
    def value_length(self) -> int:
        """Numbers of a value."""
        return self.values.shape[3]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        numbers = self.kv_heads * (self.key_length + self.value_length)
        return numbers * self.keys.element_size() + (0 if self.key_scales is None else 8 * self.kv_heads)


@dataclass(frozen=True, slots=True)
class Lanes:
    """The sequences of a step: `count` lanes with equally many of its tokens each, lane after lane.

    `table` (count, most blocks) int32: the block of the pool in which tokens b * block_tokens and up of a lane lie.
    `lengths` (count,) int32: tokens of each lane, those of this step included; read on the device when a kernel runs.
    """

    table: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.lengths.shape != self.table.shape[:1]:
            raise ValueError(f"a block table {tuple(self.table.shape)} for lengths {tuple(self.lengths.shape)}")
        if self.table.dtype != torch.int32 or self.lengths.dtype != torch.int32:
            raise TypeError(f"a block table of {self.table.dtype} and lengths of {self.lengths.dtype}, not int32")

    @property
    def count(self) -> int:
        """How many sequences."""
        return self.table.shape[0]

    def tokens_each(self, tokens: int) -> int:
        """Tokens of a lane, of `tokens` in all; ValueError if lanes would differ."""
        if tokens % self.count:
            raise ValueError(f"{tokens} tokens in {self.count} lanes")
        return tokens // self.count


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines, each (positions, pairs) float32; values beyond 2 * pairs are left as they are.

    `neighbours`: pairs are (2i, 2i + 1), GGUF's NORM order; else (i, i + pairs), NEOX.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    neighbours: bool

    def __post_init__(self) -> None:
        if self.cos.ndim != 2 or self.cos.shape != self.sin.shape:
            raise ValueError(f"cosines {tuple(self.cos.shape)} and sines {tuple(self.sin.shape)}")

    @property
    def pairs(self) -> int:
        """Pairs that turn."""
        return self.cos.shape[1]
