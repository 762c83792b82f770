"""Our logits of generated models against llama.cpp's, live."""

from pathlib import Path

import pytest
import torch

from tests.support import models, peer, running
from tests.support.divergence import check_close, max_kl_divergence
from tests.support.rounding import RoundingWeights

CASES = [pytest.param(name, quant_type, id=f"{name}-{quant_type}") for name, quant_type in models.cases()]
pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def _needs_peer() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.mark.parametrize(
    ("name", "quant_type"), models.cases(), ids=[f"{name}-{kind}" for name, kind in models.cases()]
)
@pytest.mark.parametrize("float32_kv", [True, False], ids=["F32 cache", "F16 cache"])
def test_logits_are_the_peers(name: str, quant_type: str, float32_kv: bool, tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "model.gguf", models.spec_of(name), quant_type)
    ids = models.prompt()
    kv_dtype = torch.float32 if float32_kv else torch.float16
    theirs = peer.logits_of(path, ids, float32_kv=float32_kv)
    check_close(theirs, running.logits_of(path, ids, kv_dtype=kv_dtype), quant_type)


@pytest.mark.parametrize("quant_type", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "qwen3moe", "olmoe"])
def test_what_differs_is_the_rounding_of_activations(name: str, quant_type: str, tmp_path: Path) -> None:
    """With other seeds tokens move to other experts; rounding activations as the peer does takes them back."""
    ids = models.prompt()
    for seed in (1, 2):
        path = models.write_model(tmp_path / "model.gguf", models.reseeded(models.spec_of(name), seed), quant_type)
        theirs = peer.logits_of(path, ids)
        assert max_kl_divergence(theirs, running.logits_of(path, ids, weights_class=RoundingWeights)) <= 1e-2
