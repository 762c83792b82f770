"""Our logits of generated models against llama.cpp's, as `scripts/record_peer.py` recorded them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.gguf import GGUFFile
from runtime.architectures import Model, describe
from runtime.architectures.base import Activation, QKNorm, RopeOrder, RopeScaling
from runtime.executor import Step
from runtime.executor.sequential import SequentialExecutor
from runtime.weights import Weights
from tests.support import models, running
from tests.support.divergence import MAX_KL, check_close, max_kl_divergence

CASES = [pytest.param(name, quant_type, id=f"{name}-{quant_type}") for name, quant_type in models.cases()]
FOLDER = Path(__file__).resolve().parents[1] / "data" / "peer"


def recorded(name: str, quant_type: str, path: Path) -> tuple[list[int], np.ndarray]:
    """The ids and the peer's logits of the last positions; writes the model to `path`."""
    with np.load(FOLDER / f"{name}.npz") as record:
        models.write_model(path, models.spec_of(name), quant_type)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest == str(record[f"{quant_type}_sha256"]), (
            "the generated model is not the recorded one any more: run python -m scripts.record_peer"
        )
        return record["ids"].tolist(), record[f"{quant_type}_logits"].astype(np.float32)


@pytest.mark.parametrize(
    ("name", "quant_type"), models.cases(), ids=[f"{name}-{kind}" for name, kind in models.cases()]
)
def test_logits_are_the_peers(name: str, quant_type: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    ids, peer = recorded(name, quant_type, path)
    check_close(peer, running.logits_of(path, ids)[-len(peer) :], quant_type)


def _each_layer(model: Model, **changes: object) -> Model:
    return replace(model, layers=tuple(replace(layer, **changes) for layer in model.layers))  # type: ignore[arg-type]


def _each_rope(model: Model, **changes: object) -> Model:
    layers = (replace(layer, rope=replace(layer.rope, **changes)) for layer in model.layers)  # type: ignore[arg-type]
    return replace(model, layers=tuple(layers))


def _experts(model: Model, **changes: object) -> Model:
    assert model.experts
    return replace(model, experts=replace(model.experts, **changes))  # type: ignore[arg-type]


WRONG = {
    "rope order": ("llama", lambda m: _each_rope(m, order=RopeOrder.NEOX)),
    "rope order of qwen2": ("qwen2", lambda m: _each_rope(m, order=RopeOrder.NORM)),
    "unscaled positions": ("llama-linear", lambda m: _each_rope(m, factor=1.0)),
    "linear instead of YARN": ("llama-yarn", lambda m: _each_rope(m, scaling=RopeScaling.LINEAR)),
    "no attention factor": ("qwen2-yarn", lambda m: _each_rope(m, attn_factor=1.0)),
    "no divisors": ("llama-3", lambda m: _each_rope(m, rope_freqs=None)),
    "short divisors": ("phi3-long", lambda m: _each_rope(m, original_context_length=4096)),
    "all dimensions turned": ("phi3-short", lambda m: _each_rope(m, dimension_count=64, rope_factors_short=None)),
    "no window": ("gemma3", lambda m: _each_layer(m, sliding_window=None)),
    "window off by one": ("gemma3-pattern", lambda m: _each_layer(m, sliding_window=8)),
    "global positions everywhere": ("gemma3", lambda m: _each_layer(m, rope=m.rope)),
    "no embedding scale": ("gemma3-global", lambda m: replace(m, embedding_scale=1.0)),
    "no softcap": ("gemma3-pattern", lambda m: replace(m, logit_softcap=None)),
    "SiLU for GELU": ("gemma3-global", lambda m: replace(m, activation=Activation.SILU)),
    "no norm after attention": ("gemma3-global", lambda m: _each_layer(m, post_attention_norm=None)),
    "no norm of queries and keys": ("qwen3", lambda m: replace(m, qk_norm=QKNorm.NONE)),
    "no norm of the row": ("olmoe", lambda m: replace(m, qk_norm=QKNorm.NONE)),
    "no sub norm": ("bitnet", lambda m: _each_layer(m, ffn_sub_norm=None)),
    "no factors": ("bitnet", lambda m: _each_layer(m, ffn_down_scale=None)),
    "no biases": ("qwen2", lambda m: _each_layer(m, attn_q_bias=None)),
    "no bias of the gate": ("llama-biases", lambda m: _each_layer(m, ffn_gate_bias=None)),
    "experts not normalised": ("mixtral", lambda m: _experts(m, weights_norm=False)),
    "experts normalised": ("qwen2moe", lambda m: _experts(m, weights_norm=True)),
    "one expert": ("qwen3moe", lambda m: _experts(m, used_count=1)),
    "no shared expert": ("qwen2moe", lambda m: _each_layer(m, ffn_gate_inp_shexp=None)),
    "no factors of experts": ("qwen3moe-scales", lambda m: _each_layer(m, ffn_up_exps_scale=None)),
    "attention's scale": ("phi3", lambda m: replace(m, attention_scale=1 / 16)),
    "epsilon": ("llama", lambda m: replace(m, norm_eps=1e-2)),
}


@pytest.mark.parametrize(("name", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_the_bound_fails_a_wrong_model(name: str, wrong, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    ids, peer = recorded(name, "F32", path)
    with GGUFFile.open(path) as file:
        model = describe(file)
        weights = Weights(file, model, resident=True, device=torch.device("cpu"))
        weights.load()
        executor = SequentialExecutor(wrong(model), weights, kv_dtype=torch.float32)
        ours = executor.forward([Step(ids, executor.new_kv(128))], logits="all")[0][-len(peer) :]
    assert max_kl_divergence(peer, ours) > 2 * MAX_KL[True]
