"""What a model is, as data: hyper-parameters, and for every layer the tensors that play each part.

A `Model` says everything a forward pass needs; nothing in an executor depends on the name of an architecture.
Attributes that hold tensors carry the tensor's GGUF name (`blk.3.attn_q.weight` is `layers[3].attn_q`, its `.bias`
and `.scale` are `attn_q_bias` and `attn_q_scale`); an absent tensor is None and its step is left out. A layer does

    h = attn_norm(x); q, k, v = attn_q(h), attn_k(h), attn_v(h)           (or one attn_qkv, rows in that order)
    q, k = rope(attn_q_norm(q)), rope(attn_k_norm(k))
    a = attn_output(attn_sub_norm(attention(q, k, v)));  x = x + post_attention_norm(a)
    h = ffn_norm(x);  f = ffn_down(ffn_sub_norm(activation(ffn_gate(h)) * ffn_up(h)))   (or experts, see `Experts`)
    x = x + post_ffw_norm(f)

where every matrix product is followed by its scale (a factor) and then its bias.

Knows nothing of how tensors are stored or computed. Invariant: every shape was checked when a `Model` was made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum

from offload.gguf import TensorInfo


class RopeOrder(Enum):
    """Which two values of a head turn together: neighbours (2i, 2i+1), or halves (i, i + dimensions/2)."""

    NORM = "norm"
    NEOX = "neox"


class RopeScaling(Enum):
    """How angles are changed for contexts longer than the training's; values as `rope.scaling.type` names them."""

    NONE = "none"
    LINEAR = "linear"
    YARN = "yarn"
    LONGROPE = "longrope"


class QKNorm(Enum):
    """Over what the root mean square of queries and keys is taken: each head, or the row of all heads."""

    NONE = "none"
    HEAD = "head"
    ROW = "row"


class Activation(Enum):
    """The gate's function; GELU in its tanh form."""

    SILU = "silu"
    GELU = "gelu"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: value pair i of position p turns by p * freq_base^(-2i / dimension_count), then scaled.

    `factor` stretches positions (the angle is divided by it); YARN does so only for the slow pairs, blending between
    the pairs that make `beta_fast` and `beta_slow` turns over `original_context_length` tokens, and multiplies sine
    and cosine by 1 + 0.1 ln(factor). `attn_factor` multiplies both in every case. `rope_freqs` divides the angle
    of each pair (Llama 3); of `rope_factors_long` and `rope_factors_short` the long one is used where the session's
    capacity exceeds `original_context_length`. Values of a head beyond `dimension_count` are left as they are.
    """

    order: RopeOrder
    dimension_count: int
    freq_base: float
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_context_length: int = 0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rope_freqs: TensorInfo | None = None
    rope_factors_long: TensorInfo | None = None
    rope_factors_short: TensorInfo | None = None

    def factors(self, capacity_tokens: int) -> TensorInfo | None:
        """The (dimension_count / 2,) divisors of the angles for a session of that many tokens, or None."""
        if self.rope_freqs is not None:
            return self.rope_freqs
        return self.rope_factors_long if capacity_tokens > self.original_context_length else self.rope_factors_short


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts: softmax over all `count` router logits, the `used_count` greatest probabilities are taken.

    `weights_norm`: the chosen probabilities are divided by their sum (at least 2^-14); then multiplied by
    `weights_scale`. A shared expert, where a layer has one, is added times sigmoid(ffn_gate_inp_shexp . h).
    """

    count: int
    used_count: int
    feed_forward_length: int
    shared_feed_forward_length: int = 0
    weights_norm: bool = False
    weights_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensors of one block, by their GGUF names, and what differs from layer to layer.

    `sliding_window`: a token sees itself and the `sliding_window - 1` tokens before it; None: all before it.
    Matrices are (outputs, inputs), stacked experts (experts, outputs, inputs).
    """

    index: int
    rope: Rope
    sliding_window: int | None
    attn_norm: TensorInfo
    attn_output: TensorInfo
    ffn_norm: TensorInfo
    attn_output_bias: TensorInfo | None = None
    attn_output_scale: TensorInfo | None = None
    attn_q: TensorInfo | None = None
    attn_q_bias: TensorInfo | None = None
    attn_q_scale: TensorInfo | None = None
    attn_k: TensorInfo | None = None
    attn_k_bias: TensorInfo | None = None
    attn_k_scale: TensorInfo | None = None
    attn_v: TensorInfo | None = None
    attn_v_bias: TensorInfo | None = None
    attn_v_scale: TensorInfo | None = None
    attn_qkv: TensorInfo | None = None
    attn_qkv_bias: TensorInfo | None = None
    attn_qkv_scale: TensorInfo | None = None
    attn_q_norm: TensorInfo | None = None
    attn_k_norm: TensorInfo | None = None
    attn_sub_norm: TensorInfo | None = None
    post_attention_norm: TensorInfo | None = None
    # ffn_gate is None where ffn_up holds both: the gate's rows first, then up's
    ffn_gate: TensorInfo | None = None
    ffn_gate_bias: TensorInfo | None = None
    ffn_gate_scale: TensorInfo | None = None
    ffn_up: TensorInfo | None = None
    ffn_up_bias: TensorInfo | None = None
    ffn_up_scale: TensorInfo | None = None
    ffn_down: TensorInfo | None = None
    ffn_down_bias: TensorInfo | None = None
    ffn_down_scale: TensorInfo | None = None
    ffn_sub_norm: TensorInfo | None = None
    post_ffw_norm: TensorInfo | None = None
    ffn_gate_inp: TensorInfo | None = None
    ffn_gate_exps: TensorInfo | None = None
    ffn_gate_exps_scale: TensorInfo | None = None
    ffn_up_exps: TensorInfo | None = None
    ffn_up_exps_scale: TensorInfo | None = None
    ffn_down_exps: TensorInfo | None = None
    ffn_down_exps_scale: TensorInfo | None = None
    ffn_gate_inp_shexp: TensorInfo | None = None
    ffn_gate_shexp: TensorInfo | None = None
    ffn_gate_shexp_scale: TensorInfo | None = None
    ffn_up_shexp: TensorInfo | None = None
    ffn_up_shexp_scale: TensorInfo | None = None
    ffn_down_shexp: TensorInfo | None = None
    ffn_down_shexp_scale: TensorInfo | None = None

    def tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """The tensors that are there, each with its attribute's name."""
        return _tensors_of(self)


@dataclass(frozen=True, slots=True)
class Model:
    """A whole model. `output` is `token_embd` itself where the two are tied; softcaps: cap * tanh(x / cap)."""

    architecture: str
    block_count: int
    embedding_length: int
    feed_forward_length: int
    context_length: int
    vocab_size: int
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    norm_eps: float
    attention_scale: float
    rope: Rope
    token_embd: TensorInfo
    output_norm: TensorInfo
    output: TensorInfo
    layers: tuple[Layer, ...]
    output_bias: TensorInfo | None = None
    output_scale: TensorInfo | None = None
    activation: Activation = Activation.SILU
    qk_norm: QKNorm = QKNorm.NONE
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    experts: Experts | None = None

    @property
    def expert_count(self) -> int:
        """Routed experts in a layer, 0 for a dense model."""
        return self.experts.count if self.experts else 0

    @property
    def expert_used_count(self) -> int:
        """Experts that each token uses, 0 for a dense model."""
        return self.experts.used_count if self.experts else 0

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding matrix."""
        return self.output is self.token_embd

    def tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """Every tensor once (a tied output only as `token_embd`), with its attribute's name."""
        yield from ((name, tensor) for name, tensor in _tensors_of(self) if not (name == "output" and self.is_tied))
        yield from _tensors_of(self.rope)
        for layer in self.layers:
            yield from layer.tensors()


def _tensors_of(value: Rope | Layer | Model) -> Iterator[tuple[str, TensorInfo]]:
    for field in fields(value):
        tensor = getattr(value, field.name)
        if isinstance(tensor, TensorInfo):
            yield field.name, tensor
