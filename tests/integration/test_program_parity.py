"""The program executor against llama.cpp's recorded logits, and against the sequential reference."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cpu_kernels.isa import ISA, runnable_isas
from offload.gguf import GGUFFile
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.panels import PanelWeights
from tests.integration.test_golden_logits import WRONG, recorded
from tests.support import models, programs, running
from tests.support.divergence import EXACT_TYPES, MAX_KL, MAX_KL_OF_FLOATS, kl_divergences, max_kl_divergence
from tests.support.routing import router_gaps

CASES = models.cases()
OTHER_TYPES = ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0")
NEAR_TIE = 0.1  # of router logits that spread by 3.5: rounding activations to 8 bits moves them by up to 0.05
TRAINED = (
    "bitnet-3M-F32",
    "bitnet-3M-Q4_K_M",
    "bitnet-3M-scale-F16",
    "bitnet-3M-scale-TQ1_0",
    "bitnet-3M-scale-TQ2_0",
    "stories260K-F32",
    "stories260K-Q8_0",
    "stories260K-moe8u4-F32",
    "stories260K-moe8u8-Q8_0",
    "stories260K-qwen2moe4u4-F32",
)


def check_divergence(path: Path, ids: Sequence[int], expected: np.ndarray, ours: np.ndarray, bound: float) -> None:
    """Fails unless all positions are within `bound`.

    Where rounding moved a token to another expert, which needs a router near a tie, that token and few that attend to
    it may be farther.
    """
    divergences = kl_divergences(expected, ours)
    far = np.flatnonzero(divergences > bound)
    if len(far):
        gaps = router_gaps(path, ids)[-len(ours) :]
        message = f"KL divergences {divergences[far]} at {far}, gaps of the router {gaps[far]}"
        assert gaps[far[0]] < NEAR_TIE, message
        assert len(far) <= 3, message


@pytest.mark.parametrize(("name", "quant_type"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_logits_are_the_peers(name: str, quant_type: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    ids, peer = recorded(name, quant_type, path)
    ours = programs.logits_of(path, ids, threads=2)[-len(peer) :]
    check_divergence(path, ids, peer, ours, MAX_KL[quant_type in EXACT_TYPES])


@pytest.mark.parametrize(("name", "quant_type"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_logits_are_the_references(name: str, quant_type: str, tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "model.gguf", models.spec_of(name), quant_type)
    exact = quant_type in EXACT_TYPES
    ids = models.prompt(length=90 if exact else 64)  # 64: a block of the cache, and what the models were chosen for
    expected = running.logits_of(path, ids, kv_dtype=torch.float16)
    bound = MAX_KL_OF_FLOATS if exact else MAX_KL[False]
    check_divergence(path, ids, expected, programs.logits_of(path, ids), bound)


@pytest.mark.parametrize("quant_type", OTHER_TYPES)
def test_other_quant_types(quant_type: str, tmp_path: Path) -> None:
    for name in ("llama", "mixtral"):
        path = models.write_model(tmp_path / f"{name}.gguf", models.spec_of(name), quant_type)
        ids = models.prompt(seed=12)
        expected = running.logits_of(path, ids, kv_dtype=torch.float16)
        bound = MAX_KL_OF_FLOATS if quant_type == "BF16" else MAX_KL[False]
        check_divergence(path, ids, expected, programs.logits_of(path, ids), bound)


@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
def test_every_instruction_set(isa: ISA, tmp_path: Path) -> None:
    for name, quant_type in (("llama", "F16"), ("gemma3", "Q8_0"), ("qwen2moe", "Q4_K")):
        path = models.write_model(tmp_path / f"{name}.gguf", models.spec_of(name), quant_type)
        ids = models.prompt(seed=13)
        expected = running.logits_of(path, ids, kv_dtype=torch.float16)
        bound = MAX_KL_OF_FLOATS if quant_type in EXACT_TYPES else MAX_KL[False]
        ours = programs.logits_of(path, ids, isa=isa)
        check_divergence(path, ids, expected, ours, bound)
        with programs.executor(path, isa=isa) as runner:
            kv = runner.new_kv(len(ids))
            one_by_one = [runner.forward([Step([token], kv)])[0][0] for token in ids[:20]]
        np.testing.assert_array_equal(one_by_one, ours[:20])


@pytest.mark.parametrize(("name", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_the_bound_fails_a_wrong_model(name: str, wrong, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    ids, peer = recorded(name, "F32", path)
    with GGUFFile.open(path) as file:
        model = describe(file)
        weights = PanelWeights(file, model)
        weights.load()
    executor = ProgramExecutor(wrong(model), weights)
    ours = executor.forward([Step(ids, executor.new_kv(128))], logits="all")[0][-len(peer) :]
    executor.close()
    assert max_kl_divergence(peer, ours) > 2 * MAX_KL[True]


def check_greedy(path: Path, ids: Sequence[int], count: int, tie: float) -> None:
    """Every token we take is, for the reference at the same place, the best or within `tie` of it."""
    tokens, rows = programs.greedy(path, ids, count, threads=2)
    ours = [*ids, *tokens]
    expected = running.logits_of(path, ours[:-1], capacity_tokens=len(ours), kv_dtype=torch.float16)[-count:]
    behind = expected.max(-1) - expected[np.arange(count), tokens]
    assert behind.max() <= tie, f"token {behind.argmax()} is {behind.max():.3f} behind the best"
    assert np.isfinite(rows).all()


def test_greedy_text_of_the_built_in_models() -> None:
    check_greedy(DEMO_MODEL, list(range(100, 130)), 150, tie=0.1)
    check_greedy(DEMO_DRAFT, list(range(100, 130)), 150, tie=1e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_greedy_text_of_trained_models(name: str, shared_data: Path) -> None:
    exact = name.endswith(EXACT_TYPES)
    check_greedy(shared_data / "models" / f"{name}.gguf", [1, 300, 350, 280], 100, tie=1e-3 if exact else 0.2)
