"""Row 7: hyper-parameters of the wrong type, out of bounds, or at odds with the tensors are refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import ModelFormatError, StrataError, UnsupportedModelError
from offload.gguf import GGUFFile
from runtime.architectures import Model, describe
from tests.support import models

LLAMA = models.Spec("llama", blocks=1)
MIXTRAL = models.Spec("llama", blocks=1, experts=4)
QWEN = models.Spec("qwen2moe", blocks=1, experts=4, shared_ffn=256)
GEMMA = models.Spec("gemma3", blocks=2, qk_norm="head", post_norms=True)


EXPERT_KEYS = [
    f"expert_{name}" for name in ("count", "used_count", "feed_forward_length", "shared_feed_forward_length")
]


def described(path: Path, spec: models.Spec) -> Model:
    models.write_model(path, spec)
    with GGUFFile.open(path) as file:
        return describe(file)


def refused(tmp_path: Path, spec: models.Spec, message: str, error: type[StrataError] = ModelFormatError) -> None:
    with pytest.raises(error, match=message) as caught:
        described(tmp_path / "model.gguf", spec)
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "key", "value"),
    [
        (LLAMA, "block_count", 0),
        (LLAMA, "block_count", 2**31),
        (LLAMA, "block_count", None),
        (LLAMA, "block_count", "1"),
        (LLAMA, "embedding_length", 0),
        (LLAMA, "embedding_length", 2**31),
        (LLAMA, "feed_forward_length", 0),
        (LLAMA, "feed_forward_length", None),
        (LLAMA, "feed_forward_length", 2**31),
        (LLAMA, "context_length", 0),
        (LLAMA, "context_length", 8.0),
        (LLAMA, "attention.head_count", 0),
        (LLAMA, "attention.head_count", 7),
        (LLAMA, "attention.head_count", [4, 4]),
        (LLAMA, "attention.head_count", 2**20),
        (LLAMA, "attention.head_count_kv", 3),
        (LLAMA, "attention.head_count_kv", True),
        (LLAMA, "attention.key_length", 0),
        (LLAMA, "attention.layer_norm_rms_epsilon", -1.0),
        (LLAMA, "attention.layer_norm_rms_epsilon", float("nan")),
        (LLAMA, "attention.layer_norm_rms_epsilon", None),
        (LLAMA, "rope.dimension_count", 66),
        (LLAMA, "rope.dimension_count", 63),
        (LLAMA, "rope.freq_base", 0.0),
        (LLAMA, "rope.freq_base", 1.0),
        (LLAMA, "rope.freq_base", float("inf")),
        (LLAMA, "rope.scaling.factor", -2.0),
        (LLAMA, "rope.scaling.factor", 1e30),
        (LLAMA, "rope.scaling.type", 3),
        (LLAMA, "rope.scaling.attn_factor", 0.0),
        (LLAMA, "rope.scaling.original_context_length", 0),
        (MIXTRAL, "expert_count", 2**31),
        (MIXTRAL, "expert_used_count", 0),
        (MIXTRAL, "expert_used_count", 5),
        (MIXTRAL, "expert_used_count", None),
        (QWEN, "expert_count", 0),
        (QWEN, "expert_count", None),
        (QWEN, "expert_feed_forward_length", 0),
        (QWEN, "expert_shared_feed_forward_length", 0),
        (models.Spec("qwen3", blocks=1, qk_norm="head"), "expert_count", 4),
        (GEMMA, "attention.sliding_window", -1.5),
        (GEMMA, "attention.sliding_window_pattern", [True]),
        (GEMMA, "rope.freq_base_swa", 0.5),
        (GEMMA, "final_logit_softcapping", -5.0),
    ],
)
def test_a_bad_hyper_parameter_is_named(spec: models.Spec, key: str, value: Any, tmp_path: Path) -> None:
    window = {"attention.sliding_window": 8} if key.endswith("pattern") else {}
    words = {"attention.head_count": "heads|head_count", "attention.head_count_kv": "heads|head_count_kv"}
    refused(tmp_path, models.changed(spec, window | {key: value}), words.get(key, key.replace(".", r"\.")))


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (LLAMA, {"feed_forward_length": 128}, r"blk.0.ffn_gate.weight has the shape \(256, 256\), not \(128, 256\)"),
        (LLAMA, {"block_count": 2}, "tensor blk.1.attn_norm.weight is missing"),
        (LLAMA, {"attention.head_count_kv": 4}, "tensor blk.0.attn_k.weight has the shape"),
        (LLAMA, {"embedding_length": 512}, "tensor token_embd.weight has the shape"),
        (MIXTRAL, {"expert_count": 5}, "tensor blk.0.ffn_gate_inp.weight has the shape"),
        (QWEN, {"expert_feed_forward_length": 64}, "tensor blk.0.ffn_gate_exps.weight has the shape"),
        (QWEN, {"expert_shared_feed_forward_length": 64}, "tensor blk.0.ffn_gate_shexp.weight has the shape"),
        (replace(QWEN, tied=True), {}, "tensor output.weight is missing"),
        (LLAMA, {"attention.key_length": 32}, "rope.dimension_count"),
    ],
)
def test_tensors_at_odds_with_the_metadata(
    spec: models.Spec, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(tmp_path, models.changed(spec, change), message)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (models.changed(LLAMA, {"rope.scaling.type": "spiral"}), "'spiral'; known: none, linear, yarn, longrope"),
        (
            models.changed(models.Spec("llama", blocks=2), {"attention.head_count_kv": [2, 1]}),
            "head_count_kv differs from block to block",
        ),
        (models.Spec("llama", blocks=1, qk_norm="head"), "llama models have no part for blk.0.attn_q_norm.weight"),
        (models.Spec("bitnet", blocks=1, sub_norms=True), "bitnet models have no part for output.weight"),
    ],
)
def test_sound_files_that_cannot_be_run(spec: models.Spec, message: str, tmp_path: Path) -> None:
    refused(tmp_path, spec, message, UnsupportedModelError)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(
        [
            "block_count",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "attention.value_length",
            "rope.dimension_count",
            *EXPERT_KEYS,
        ]
    ),
    value=st.one_of(
        st.integers(0, 2**32 - 1),
        st.integers(0, 600),
        st.floats(width=32),
        st.text(st.characters(codec="ascii"), max_size=4),
        st.booleans(),
        st.lists(st.integers(0, 300), min_size=1, max_size=3),
    ),
)
def test_any_value_is_described_or_refused(key: str, value: Any, tmp_path: Path) -> None:
    """Whatever a size is, the result is the right model or a typed error, never another exception."""
    try:
        model = described(tmp_path / "model.gguf", models.changed(QWEN, {key: value}))
    except (ModelFormatError, UnsupportedModelError):
        return
    assert model.layers[0].attn_q is not None
    assert model.layers[0].attn_q.shape == (model.head_count * model.key_length, model.embedding_length)
