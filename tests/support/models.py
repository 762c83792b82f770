"""Small random GGUF models of every architecture, the same bytes on every machine.

Weights are drawn from integers, so that no library's transcendental functions come into them. As in trained models
attention and routers choose, each block adds half as much as the embedding, and logits spread by about 3, so that a
divergence means something. Hidden size 256: K-quants fit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.support.random_weights import quantised, uniform
from tests.support.vocabularies import add_spm_vocabulary

HIDDEN = 256
VOCAB = 384
QUANT_TYPES = ("F32", "F16", "Q8_0", "Q4_K")


@dataclass(frozen=True)
class Spec:
    """What to generate; `metadata` is added under the architecture's prefix, None removes a key."""

    architecture: str
    blocks: int = 2
    heads: int = 4
    kv_heads: int = 2
    key_length: int = 64
    ffn: int = 256
    experts: int = 0
    experts_used: int = 2
    shared_ffn: int = 0
    tied: bool = False
    biases: tuple[str, ...] = ()
    fused: bool = False
    qk_norm: str = ""
    sub_norms: bool = False
    post_norms: bool = False
    scales: bool = False
    rope_factors: Mapping[str, Callable[[int], float]] = field(default_factory=dict)
    rotated: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1


_QKV = ("attn_q", "attn_k", "attn_v")
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}

# One plain model of each kind, generated in every type of `QUANT_TYPES`. The seeds of those with experts are ones where
# rounding activations to 8 bits, as the peer does, moves no token to another expert: where one moves, the divergence is
# between 0.03 and 1, and says nothing about the arithmetic (`tests/support/rounding.py` shows that this is the cause).
FAMILIES: dict[str, Spec] = {
    "llama": Spec("llama"),
    "mixtral": Spec("llama", experts=6, seed=24),
    "qwen2": Spec("qwen2", biases=_QKV, tied=True),
    "qwen3": Spec("qwen3", qk_norm="head", tied=True),
    "qwen2moe": Spec("qwen2moe", biases=_QKV, experts=6, shared_ffn=256, seed=5),
    "qwen3moe": Spec("qwen3moe", qk_norm="head", experts=6, seed=7),
    "olmoe": Spec("olmoe", kv_heads=4, qk_norm="row", experts=6, seed=3),
    "bitnet": Spec("bitnet", tied=True, sub_norms=True, scales=True),
    "gemma3": Spec(
        "gemma3",
        blocks=6,
        tied=True,
        qk_norm="head",
        post_norms=True,
        metadata={
            "attention.sliding_window": 16,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": Spec("phi3", fused=True),
}

# what the plain ones leave out, generated in F32
VARIANTS: dict[str, Spec] = {
    "llama-linear": Spec("llama", tied=True, metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama-3": Spec(
        "llama",
        kv_heads=1,
        rope_factors={"rope_freqs": lambda pair: 1.0 if pair < 12 else 8.0 if pair > 20 else 1.0 + (pair - 12) * 0.875},
        metadata={"rope.freq_base": 500000.0},
    ),
    "llama-yarn": Spec("llama", metadata=_YARN),
    "llama-biases": Spec("llama", biases=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    "mixtral-all-used": Spec("llama", experts=4, experts_used=4),
    "qwen2-yarn": Spec("qwen2", biases=_QKV, metadata=_YARN | {"rope.scaling.attn_factor": 1.25}),
    "qwen3-wide-heads": Spec("qwen3", heads=4, kv_heads=4, key_length=96, qk_norm="head"),
    "qwen3moe-scales": Spec("qwen3moe", qk_norm="head", experts=4, experts_used=3, tied=True, scales=True),
    "gemma3-pattern": Spec(
        "gemma3",
        blocks=4,
        tied=True,
        qk_norm="head",
        post_norms=True,
        metadata={
            "attention.sliding_window": 7,
            "attention.sliding_window_pattern": [True, False, False, True],
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 500.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3-global": Spec("gemma3", tied=True, qk_norm="head", post_norms=True),
    "phi3-short": Spec(
        "phi3",
        fused=True,
        tied=True,
        rotated=48,
        rope_factors={"rope_factors_short": lambda p: 1 + p / 16, "rope_factors_long": lambda p: 2 + p / 4},
        metadata={"rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.19},
    ),
    "phi3-long": Spec(
        "phi3",
        fused=True,
        rope_factors={"rope_factors_short": lambda p: 1 + p / 16, "rope_factors_long": lambda p: 2 + p / 4},
        metadata={
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": 1.19,
            "attention.sliding_window": 16,
        },
    ),
}


def cases() -> list[tuple[str, str]]:
    """(name, quant type) of every model that is compared with the peer."""
    plain = [(name, quant_type) for name in FAMILIES for quant_type in QUANT_TYPES]
    return [*plain, ("bitnet", "TQ1_0"), ("bitnet", "TQ2_0"), *((name, "F32") for name in VARIANTS)]


def spec_of(name: str) -> Spec:
    """From `FAMILIES` or `VARIANTS`."""
    return FAMILIES[name] if name in FAMILIES else VARIANTS[name]


def generated(folder: Path, name: str, quant_type: str = "F32") -> Path:
    """The file of a family or variant in `folder`, written the first time."""
    path = folder / f"{name}-{quant_type}.gguf"
    return path if path.exists() else write_model(path, spec_of(name), quant_type)


def write_model(path: Path, spec: Spec, quant_type: str = "F32") -> Path:
    """Writes the model and returns its path."""
    writer = gguf.GGUFWriter(path, spec.architecture)
    _add_metadata(writer, spec)
    add_spm_vocabulary(writer, VOCAB)
    for name, (shape, deviation) in tensors(spec).items():
        rng = np.random.default_rng([spec.seed, *name.encode()])
        if deviation is None:
            writer.add_tensor(name, _plain(name, shape, rng, spec))
        else:
            data, dtype = quantised(rng, shape, deviation, quant_type)
            writer.add_tensor(name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(spec: Spec, metadata: Mapping[str, Any]) -> Spec:
    """The spec with other metadata."""
    return replace(spec, metadata={**spec.metadata, **metadata})


def reseeded(spec: Spec, seed: int) -> Spec:
    """The spec with other random weights."""
    return replace(spec, seed=seed)


def prompt(seed: int = 7, length: int = 64) -> list[int]:
    """BOS and random tokens."""
    return [1, *np.random.default_rng(seed).integers(3, VOCAB, length - 1).tolist()]


def tensors(spec: Spec) -> dict[str, tuple[tuple[int, ...], float | None]]:
    """Every tensor's shape and the deviation of its weights; None for vectors and routers, which stay in F32."""
    q, kv = spec.heads * spec.key_length, spec.kv_heads * spec.key_length
    head = 3.0 / HIDDEN**0.5
    table: dict[str, tuple[tuple[int, ...], float | None]] = {"token_embd.weight": ((VOCAB, HIDDEN), head)}

    def add(name: str, *shape: int) -> None:
        gain = 0.12 if "attn_output" in name or "ffn_down" in name else 1.4
        table[f"{name}.weight"] = (shape, gain / shape[-1] ** 0.5)
        if name.rsplit(".", maxsplit=1)[-1] in spec.biases:
            table[f"{name}.bias"] = (shape[:1], None)
        if spec.scales:
            table[f"{name}.scale"] = (shape[:1] if len(shape) == 3 else (1,), None)

    for block in (f"blk.{index}" for index in range(spec.blocks)):
        norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
        if spec.qk_norm:
            row = spec.qk_norm == "row"
            norms |= {"attn_q_norm": q if row else spec.key_length, "attn_k_norm": kv if row else spec.key_length}
        if spec.sub_norms:
            norms |= {"attn_sub_norm": q, "ffn_sub_norm": spec.ffn}
        if spec.post_norms:
            norms |= {"post_attention_norm": HIDDEN, "post_ffw_norm": HIDDEN}
        table |= {f"{block}.{name}.weight": ((width,), None) for name, width in norms.items()}
        if spec.fused:
            add(f"{block}.attn_qkv", q + 2 * kv, HIDDEN)
        else:
            for name, rows in zip(_QKV, (q, kv, kv), strict=True):
                add(f"{block}.{name}", rows, HIDDEN)
        add(f"{block}.attn_output", HIDDEN, q)
        if spec.experts:
            table[f"{block}.ffn_gate_inp.weight"] = ((spec.experts, HIDDEN), None)
            add(f"{block}.ffn_gate_exps", spec.experts, spec.ffn, HIDDEN)
            add(f"{block}.ffn_up_exps", spec.experts, spec.ffn, HIDDEN)
            add(f"{block}.ffn_down_exps", spec.experts, HIDDEN, spec.ffn)
        suffix, width = ("_shexp", spec.shared_ffn) if spec.experts else ("", spec.ffn)
        if width and spec.fused:
            add(f"{block}.ffn_up", 2 * width, HIDDEN)
        elif width:
            add(f"{block}.ffn_gate{suffix}", width, HIDDEN)
            add(f"{block}.ffn_up{suffix}", width, HIDDEN)
        if width:
            add(f"{block}.ffn_down{suffix}", HIDDEN, width)
        if spec.shared_ffn:
            table[f"{block}.ffn_gate_inp_shexp.weight"] = ((HIDDEN,), None)
    table["output_norm.weight"] = ((HIDDEN,), None)
    if not spec.tied:
        table["output.weight"] = ((VOCAB, HIDDEN), head)
    pairs = (spec.rotated or spec.key_length) // 2
    return table | {f"{name}.weight": ((pairs,), None) for name in spec.rope_factors}


def _add_metadata(writer: gguf.GGUFWriter, spec: Spec) -> None:
    values: dict[str, Any] = {
        "context_length": 256,
        "embedding_length": HIDDEN,
        "block_count": spec.blocks,
        "feed_forward_length": spec.ffn,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": spec.rotated or spec.key_length,
    }
    if spec.key_length * spec.heads != HIDDEN:
        values |= {"attention.key_length": spec.key_length, "attention.value_length": spec.key_length}
    if spec.experts:
        values |= {"expert_count": spec.experts, "expert_used_count": spec.experts_used}
        if spec.architecture.startswith("qwen"):
            values["expert_feed_forward_length"] = spec.ffn
    if spec.shared_ffn:
        values["expert_shared_feed_forward_length"] = spec.shared_ffn
    for key, value in (values | dict(spec.metadata)).items():
        if value is not None:
            add_value(writer, f"{spec.architecture}.{key}", value)


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Adds a key with the GGUF type that a Python value stands for; integers are uint32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, value)
    else:
        raise TypeError(f"no GGUF type for {value!r}")


def _plain(name: str, shape: tuple[int, ...], rng: np.random.Generator, spec: Spec) -> NDArray[np.float32]:
    part = name.split(".")[-2]
    if part in spec.rope_factors:
        return np.array([spec.rope_factors[part](pair) for pair in range(shape[0])], np.float32)
    noise = uniform(rng, shape)
    if name == "output_norm.weight":  # signs: else a tied output would prefer the token it has just seen
        return np.sign(noise + np.float32(2**-12)) * (1 + uniform(rng, shape) * np.float32(0.25))
    if "norm" in name:
        return 1 + noise * np.float32(0.25)
    if name.endswith(".scale"):
        return np.float32(0.75) + np.abs(noise) * np.float32(0.5)
    if name.endswith(".bias"):
        return noise * np.float32(0.5)
    return noise * np.float32(0.375)  # routers: logits spread by about 3.5
