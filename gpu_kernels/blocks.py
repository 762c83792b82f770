"""Keys and values in blocks of tokens, and which blocks the sequences of a step use. Knows nothing about models."""

from dataclasses import dataclass

import torch

GROUP = 32  # neighbouring dimensions of a head that share a scale
_WHOLE = torch.float16, torch.bfloat16
_CODED = torch.int8, torch.uint8


@dataclass(frozen=True, slots=True)
class KVRows:
    """The keys, or the values, of one layer, of all sequences: of every token a row for each KV head.

    `numbers` (blocks, block_tokens, kv_heads, n), contiguous: float16 or bfloat16, n = `length`. Or codes with `scales`
    (blocks, block_tokens, kv_heads, groups) float16, one for 32 neighbouring dimensions or what is left of them: int8,
    a number being code * scale; or uint8 with two codes of 4 bits, a number being (code - 8) * scale. Of codes there
    are whole steps of `step` dimensions, what lies behind `length` filling them up: zeros, or where a step is a whole
    group the code of that group's first. A byte of 4-bit codes holds dimensions step / 2 apart, the first in its low
    bits. `is_turned`: rows, and for keys queries too, are multiplied by the orthogonal Walsh-Hadamard matrix.
    """

    numbers: torch.Tensor
    length: int
    scales: torch.Tensor | None = None
    step: int = 1
    is_turned: bool = False

    def __post_init__(self) -> None:
        is_coded = self.scales is not None
        shape, groups = self.numbers.shape, -(-self.length // GROUP)
        if self.numbers.dtype not in (_CODED if is_coded else _WHOLE):
            raise TypeError(f"keys or values are {self.numbers.dtype}, {'with' if is_coded else 'without'} scales")
        if len(shape) != 4 or shape[3] != row_numbers(self.numbers.dtype, self.length, self.step):
            raise ValueError(f"keys or values {tuple(shape)} of heads of {self.length}, in steps of {self.step}")
        if self.scales is not None and (*shape[:3], groups) != self.scales.shape:
            raise ValueError(f"keys or values {tuple(shape)} and scales {tuple(self.scales.shape)}")
        if self.scales is not None and self.scales.dtype != torch.float16:
            raise TypeError(f"scales of keys or values are {self.scales.dtype}, not float16")
        if self.is_turned and self.length & (self.length - 1):
            raise ValueError(f"heads of {self.length} cannot be turned: not a power of two")

    @property
    def kind(self) -> str:
        """The name of the type that the numbers are kept in."""
        return {_WHOLE[0]: "f16", _WHOLE[1]: "bf16", _CODED[0]: "q8_0", _CODED[1]: "q4_0"}[self.numbers.dtype]

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """All that lies in memory, in tensors with a row a block."""
        return (self.numbers,) if self.scales is None else (self.numbers, self.scales)


def row_numbers(dtype: torch.dtype, length: int, step: int) -> int:
    """How many numbers, or bytes with two codes, a row of `length` dimensions takes."""
    return -(-length // step) * step // (2 if dtype == torch.uint8 else 1)


@dataclass(frozen=True, slots=True)
class KVBlocks:
    """The keys and values of one layer, of all sequences: a pool of blocks of `block_tokens` tokens."""

    keys: KVRows
    values: KVRows

    def __post_init__(self) -> None:
        shapes = [tuple(rows.numbers.shape) for rows in (self.keys, self.values)]
        if shapes[0][:3] != shapes[1][:3]:
            raise ValueError(f"keys {shapes[0]} and values {shapes[1]}")

    @property
    def count(self) -> int:
        """How many blocks."""
        return self.keys.numbers.shape[0]

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.keys.numbers.shape[1]

    @property
    def kv_heads(self) -> int:
        """Heads that have keys."""
        return self.keys.numbers.shape[2]

    @property
    def key_length(self) -> int:
        """Dimensions of a key."""
        return self.keys.length

    @property
    def value_length(self) -> int:
        """Dimensions of a value."""
        return self.values.length

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """All that lies in memory, in tensors with a row a block."""
        return (*self.keys.parts, *self.values.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(part.nbytes for part in self.parts)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        return sum(part[0, 0].nbytes for part in self.parts)


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
