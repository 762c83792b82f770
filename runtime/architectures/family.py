"""The flags that tell one architecture from another; each family's file states its own in one `Family`.

Knows nothing about files; `describe.py` reads a file by these flags.
"""

from dataclasses import dataclass

from runtime.architectures.base import Activation, QKNorm, RopeOrder

SELF_ATTENTION = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv"})


@dataclass(frozen=True, slots=True)
class ExpertRule:
    """How a family uses experts; `required`: every file has them, else where `expert_count` is above 0.

    `width_key`: whether `expert_feed_forward_length` counts; without it an expert is `feed_forward_length` wide, or
    (`split_width`) that over the number of experts used.
    """

    required: bool
    weights_norm: bool
    shared: bool = False
    width_key: bool = True
    split_width: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """The flags of an architecture.

    `biases`: matrices that may have one. `may_tie`, `may_untie`: whether `output.weight` may be absent, may be there.
    `rope_tensors`: divisors of the rotary angles that a file may hold.
    """

    name: str
    rope_order: RopeOrder
    biases: frozenset[str] = frozenset()
    qk_norm: QKNorm = QKNorm.NONE
    activation: Activation = Activation.SILU
    experts: ExpertRule | None = None
    may_tie: bool = True
    may_untie: bool = True
    fused_qkv: bool = True
    sub_norms: bool = False
    post_norms: bool = False
    fused_gate_up: bool = False
    rope_tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Special:
    """What a family computes from keys of its own. `sliding_windows`, `local_freq_base`: of layers with a window."""

    attention_scale: float | None = None
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    sliding_windows: tuple[int | None, ...] | None = None
    local_freq_base: float = 10000.0
