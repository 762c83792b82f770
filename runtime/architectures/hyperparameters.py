"""The hyper-parameters that all architectures share, read from a file's metadata and held to sane bounds.

Knows nothing about tensors or about what sets one architecture apart. Invariant: every value is within the bounds
below, heads divide, and per-layer arrays are uniform (no architecture here differs from layer to layer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offload.errors import ModelFormatError, UnsupportedModelError
from offload.gguf import GGUFFile
from runtime.architectures.base import RopeScaling

MAX_BLOCKS = 1024
MAX_WIDTH = 1 << 22
MAX_HEADS = 1 << 14
MAX_EXPERTS = 1 << 12
MAX_CONTEXT = 1 << 31
MAX_FACTOR = 1e6


def format_error(gguf: GGUFFile, text: str) -> ModelFormatError:
    """The error of a file whose metadata contradicts itself."""
    return ModelFormatError(f"{gguf.path}: {text}", hint="the file is damaged or was converted wrongly")


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Sizes and constants of a model, under their GGUF names; see `Model`."""

    prefix: str
    block_count: int
    embedding_length: int
    feed_forward_length: int
    context_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    norm_eps: float
    rope_dimension_count: int

    @classmethod
    def read(cls, gguf: GGUFFile) -> "Hyperparameters":
        """Reads `<architecture>.*`; ModelFormatError names the key and the bound it breaks."""
        prefix = gguf.architecture
        block_count = gguf.get_int(f"{prefix}.block_count", minimum=1, maximum=MAX_BLOCKS)
        embedding_length = gguf.get_int(f"{prefix}.embedding_length", minimum=1, maximum=MAX_WIDTH)
        head_count = uniform_int(gguf, f"{prefix}.attention.head_count", block_count, MAX_HEADS)
        head_count_kv = uniform_int(gguf, f"{prefix}.attention.head_count_kv", block_count, MAX_HEADS, head_count)
        if head_count % head_count_kv:
            raise format_error(gguf, f"{head_count} heads cannot share {head_count_kv} key and value heads")
        key_length = _head_length(gguf, f"{prefix}.attention.key_length", embedding_length, head_count)
        value_length = _head_length(gguf, f"{prefix}.attention.value_length", embedding_length, head_count)
        rotated = gguf.get_int(f"{prefix}.rope.dimension_count", key_length, minimum=2, maximum=key_length)
        if rotated % 2:
            raise format_error(gguf, f"{prefix}.rope.dimension_count is {rotated}, which is odd")
        return cls(
            prefix=prefix,
            block_count=block_count,
            embedding_length=embedding_length,
            feed_forward_length=uniform_int(gguf, f"{prefix}.feed_forward_length", block_count, MAX_WIDTH, 0),
            context_length=gguf.get_int(f"{prefix}.context_length", minimum=1, maximum=MAX_CONTEXT),
            head_count=head_count,
            head_count_kv=head_count_kv,
            key_length=key_length,
            value_length=value_length,
            norm_eps=gguf.get_float(f"{prefix}.attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0),
            rope_dimension_count=rotated,
        )


def uniform_int(gguf: GGUFFile, key: str, block_count: int, maximum: int, default: int | None = None) -> int:
    """A positive number, or an array that says the same one for each block; `default` (0 too) where it is absent."""
    value = gguf.metadata.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, np.ndarray):
        return gguf.get_int(key, minimum=1, maximum=maximum)
    values = gguf.get_ints(key)
    if len(values) != block_count:
        raise format_error(gguf, f"{key} has {len(values)} values for {block_count} blocks")
    if int(values.min()) != int(values.max()):
        raise UnsupportedModelError(
            f"{gguf.path}: {key} differs from block to block", hint="try --engine llama.cpp, which may know this model"
        )
    if not 1 <= int(values[0]) <= maximum:
        raise format_error(gguf, f"{key} is {values[0]}, which is not in 1..{maximum}")
    return int(values[0])


def positive_float(gguf: GGUFFile, key: str, default: float, *, above: float = 0.0, maximum: float = 1e15) -> float:
    """A number in (above, maximum], `default` where it is absent."""
    value = gguf.get_float(key, default, maximum=maximum)
    if value <= above:
        raise format_error(gguf, f"{key} is {value}, which is not above {above:g}")
    return value


def rope_scaling(gguf: GGUFFile, prefix: str) -> tuple[RopeScaling, float]:
    """How the file stretches positions, and by what factor; UnsupportedModelError names an unknown way."""
    name = gguf.get_str(f"{prefix}.rope.scaling.type", RopeScaling.LINEAR.value)
    try:
        scaling = RopeScaling(name)
    except ValueError:
        known = ", ".join(way.value for way in RopeScaling)
        raise UnsupportedModelError(
            f"{gguf.path}: {prefix}.rope.scaling.type is {name!r}; known: {known}",
            hint="try --engine llama.cpp, which may know it",
        ) from None
    if scaling is RopeScaling.NONE:
        return scaling, 1.0
    older = gguf.get_float(f"{prefix}.rope.scale_linear", 0.0, minimum=0.0, maximum=MAX_FACTOR)
    return scaling, gguf.get_float(f"{prefix}.rope.scaling.factor", older, minimum=0.0, maximum=MAX_FACTOR) or 1.0


def check_vocabulary(gguf: GGUFFile, vocab_size: int) -> None:
    """ModelFormatError unless the vocabulary in the file, where there is one, has one entry a row of the embedding."""
    tokens: Any = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and not isinstance(tokens, str) and len(tokens) != vocab_size:
        raise format_error(gguf, f"token_embd.weight has {vocab_size} rows for a vocabulary of {len(tokens)} tokens")


def _head_length(gguf: GGUFFile, key: str, embedding_length: int, head_count: int) -> int:
    if key in gguf.metadata:
        return gguf.get_int(key, minimum=1, maximum=MAX_WIDTH)
    if embedding_length % head_count:
        raise format_error(gguf, f"{head_count} heads do not divide an embedding of {embedding_length}, and no {key}")
    return embedding_length // head_count
