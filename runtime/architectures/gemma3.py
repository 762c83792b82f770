"""Gemma 3: five layers with a sliding window and unscaled positions, then one that sees everything.

Also norms after attention and feed-forward, queries and keys normalised head by head, a GELU gate, and embeddings
multiplied by the root of their length. The norms' weights in a file include the 1 that the paper adds.
"""

import numpy as np

from offload.gguf import GGUFFile
from runtime.architectures.base import Activation, Model, QKNorm, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import SELF_ATTENTION, Family, Special
from runtime.architectures.hyperparameters import MAX_BLOCKS, MAX_CONTEXT, Hyperparameters, format_error, positive_float

FAMILY = Family(
    name="gemma3",
    rope_order=RopeOrder.NEOX,
    biases=SELF_ATTENTION,
    qk_norm=QKNorm.HEAD,
    activation=Activation.GELU,
    post_norms=True,
)

GLOBAL_EVERY = 6
BLOCKS_OF_27B = 62


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`.

    The 27B model, told by its 62 blocks, scales attention by the embedding's share of a head, not by the head.
    """
    params = Hyperparameters.read(gguf)
    head = params.embedding_length // params.head_count if params.block_count == BLOCKS_OF_27B else params.key_length
    softcap = gguf.get_float("gemma3.final_logit_softcapping", 0.0)
    special = Special(
        attention_scale=head**-0.5,
        embedding_scale=params.embedding_length**0.5,
        logit_softcap=positive_float(gguf, "gemma3.final_logit_softcapping", softcap) if softcap else None,
        sliding_windows=_sliding_windows(gguf, params.block_count),
        local_freq_base=positive_float(gguf, "gemma3.rope.freq_base_swa", 10000.0, above=1.0),
    )
    return describe_family(gguf, FAMILY, special)


def _sliding_windows(gguf: GGUFFile, block_count: int) -> tuple[int | None, ...]:
    window = gguf.get_int("gemma3.attention.sliding_window", 0, minimum=0, maximum=MAX_CONTEXT)
    if window == 0:
        return (None,) * block_count
    key = "gemma3.attention.sliding_window_pattern"
    if isinstance(gguf.metadata.get(key), np.ndarray):
        local = [bool(flag) for flag in np.asarray(gguf.metadata[key])]
        if len(local) != block_count:
            raise format_error(gguf, f"{key} has {len(local)} values for {block_count} blocks")
    else:
        period = gguf.get_int(key, GLOBAL_EVERY, minimum=0, maximum=MAX_BLOCKS)
        local = [period == 0 or index % period < period - 1 for index in range(block_count)]
    return tuple(window if flag else None for flag in local)
