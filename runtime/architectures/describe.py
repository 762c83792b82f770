"""Makes the `Model` of a file from the flags of its family.

Knows nothing about running a model. Invariant: a model is described whole and right, or refused: bounds on every
count, a shape for every tensor, and no tensor in the file that the description leaves out.
"""

from offload.gguf import GGUFFile, TensorInfo
from runtime.architectures.base import Experts, Model, Rope, RopeScaling
from runtime.architectures.block import Block
from runtime.architectures.family import ExpertRule, Family, Special
from runtime.architectures.hyperparameters import (
    MAX_EXPERTS,
    MAX_FACTOR,
    MAX_WIDTH,
    Hyperparameters,
    check_vocabulary,
    format_error,
    positive_float,
    rope_scaling,
    uniform_int,
)
from runtime.architectures.tensors import TensorTable


def describe_family(gguf: GGUFFile, family: Family, special: Special | None = None) -> Model:
    """The description of a file of this family; ModelFormatError or UnsupportedModelError naming key or tensor."""
    special = special or Special()
    params = Hyperparameters.read(gguf)
    table = TensorTable(gguf)
    experts = _experts(gguf, params, family.experts)
    if experts is None and not params.feed_forward_length:
        raise format_error(gguf, f"{params.prefix}.feed_forward_length is missing")
    embedding = params.embedding_length
    token_embd = table.rows("token_embd.weight", embedding)
    vocab_size = token_embd.shape[0]
    check_vocabulary(gguf, vocab_size)
    rope = _rope(gguf, params, family, table)
    local_rope = Rope(
        rope.order, rope.dimension_count, special.local_freq_base, RopeScaling.NONE, attn_factor=rope.attn_factor
    )
    windows = special.sliding_windows or (None,) * params.block_count
    model = Model(
        architecture=family.name,
        block_count=params.block_count,
        embedding_length=embedding,
        feed_forward_length=params.feed_forward_length,
        context_length=params.context_length,
        vocab_size=vocab_size,
        head_count=params.head_count,
        head_count_kv=params.head_count_kv,
        key_length=params.key_length,
        value_length=params.value_length,
        norm_eps=params.norm_eps,
        attention_scale=special.attention_scale or params.key_length**-0.5,
        rope=rope,
        token_embd=token_embd,
        output_norm=table.required("output_norm.weight", (embedding,)),
        output=_output(table, family, token_embd),
        output_bias=table.optional("output.bias", (vocab_size,)) if "output" in family.biases else None,
        output_scale=table.optional("output.scale", (1,)),
        layers=tuple(
            Block(index, table, params, family, experts).layer(rope if window is None else local_rope, window)
            for index, window in enumerate(windows)
        ),
        activation=family.activation,
        qk_norm=family.qk_norm,
        embedding_scale=special.embedding_scale,
        logit_softcap=special.logit_softcap,
        experts=experts,
    )
    table.refuse_leftovers()
    return model


def _output(table: TensorTable, family: Family, token_embd: TensorInfo) -> TensorInfo:
    if not family.may_tie:
        return table.required("output.weight", token_embd.shape)
    separate = table.optional("output.weight", token_embd.shape) if family.may_untie else None
    return separate or token_embd


def _experts(gguf: GGUFFile, params: Hyperparameters, rule: ExpertRule | None) -> Experts | None:
    prefix, blocks = params.prefix, params.block_count
    count = gguf.get_int(f"{prefix}.expert_count", 0, minimum=0, maximum=MAX_EXPERTS)
    if rule is None or (count == 0 and not rule.required):
        if count:
            raise format_error(gguf, f"{prefix}.expert_count is {count}, but {prefix} models have no experts")
        return None
    if count == 0:
        raise format_error(gguf, f"{prefix}.expert_count is missing or 0")
    used = uniform_int(gguf, f"{prefix}.expert_used_count", blocks, MAX_EXPERTS)
    if used > count:
        raise format_error(gguf, f"{prefix}.expert_used_count is {used}, more than the {count} experts")
    width = params.feed_forward_length // used if rule.split_width else params.feed_forward_length
    if rule.width_key:
        width = uniform_int(gguf, f"{prefix}.expert_feed_forward_length", blocks, MAX_WIDTH, width)
    if not width:
        raise format_error(gguf, f"neither {prefix}.expert_feed_forward_length nor feed_forward_length is given")
    shared = 0
    if rule.shared:
        key = f"{prefix}.expert_shared_feed_forward_length"
        shared = gguf.get_int(key, params.feed_forward_length, minimum=1, maximum=MAX_WIDTH)
    return Experts(count, used, width, shared, weights_norm=rule.weights_norm)


def _rope(gguf: GGUFFile, params: Hyperparameters, family: Family, table: TensorTable) -> Rope:
    """The rotary positions of all layers but those with a window.

    YARN's beta_fast and beta_slow keep their defaults, as in llama.cpp, which reads the keys for other families alone.
    """
    prefix = params.prefix
    scaling, factor = rope_scaling(gguf, prefix)

    def divisors(name: str) -> TensorInfo | None:
        pairs = params.rope_dimension_count // 2
        return table.optional(f"{name}.weight", (pairs,)) if name in family.rope_tensors else None

    return Rope(
        order=family.rope_order,
        dimension_count=params.rope_dimension_count,
        freq_base=positive_float(gguf, f"{prefix}.rope.freq_base", 10000.0, above=1.0),
        scaling=scaling,
        factor=factor,
        original_context_length=gguf.get_int(
            f"{prefix}.rope.scaling.original_context_length", params.context_length, minimum=1
        ),
        attn_factor=positive_float(gguf, f"{prefix}.rope.scaling.attn_factor", 1.0, maximum=MAX_FACTOR),
        rope_freqs=divisors("rope_freqs"),
        rope_factors_long=divisors("rope_factors_long"),
        rope_factors_short=divisors("rope_factors_short"),
    )
