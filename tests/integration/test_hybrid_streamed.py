"""Hybrid runs whose CPU has not all weights in RAM: the same tokens as with all of them there."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.expert_rates import ExpertRates
from offload.gguf import GGUFFile
from planner.budget import MIB, Budget
from planner.gpu_choice import chosen_gpu
from planner.hybrid_needs import needs_of, placements_of
from planner.hybrid_split import Split
from planner.model_shape import ModelShape
from planner.plan_check import check_runnable
from planner.question import Wish
from planner.solve import question_here, solve
from runtime.engine import Engine
from runtime.executor.hybrid import HybridPlacement
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams
from tests.support import programs
from tests.support.divergence import MAX_KL_OF_FLOATS, kl_divergences
from tests.support.hybrid import (
    BRINGING_FROM_FLASH,
    IDS,
    all_logits,
    continued,
    expected,
    hybrid,
    logits_after_failed_reads,
    model_of,
    placements,
)
from tests.support.models import generated

BOTH = frozenset({0, 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def placed(**options: object) -> HybridPlacement:
    """Both layers' experts on both devices."""
    seeds = tuple((layer, expert) for expert in range(0, 6, 2) for layer in (0, 1))
    return HybridPlacement(BOTH, BOTH, **{"output": True, "expert_slots": 6, "seeds": seeds, **options})


@pytest.mark.parametrize(("name", "quant_type"), [("mixtral", "F32"), ("qwen2moe", "F32"), ("qwen3moe", "F16")])
def test_any_placement_gives_the_cpus_tokens(name: str, quant_type: str, folder: Path) -> None:
    path = generated(folder, name, quant_type)
    model, (tokens, rows) = model_of(path), expected(path)
    experts, used = model.expert_count, model.experts.used_count

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(placement=placements(model), slots=st.integers(used, 2 * experts))
    def check(placement: HybridPlacement, slots: int) -> None:
        with hybrid(path, placement, rates=BRINGING_FROM_FLASH, threads=2, stream_slots=slots) as runner:
            ours = continued(runner, IDS, tokens)
        assert kl_divergences(rows, ours).max() <= MAX_KL_OF_FLOATS
        assert ours.argmax(-1).tolist() == tokens

    check()


def test_layers_of_a_dense_model(folder: Path) -> None:
    path = generated(folder, "llama")
    tokens, rows = expected(path)
    for placement in (HybridPlacement(frozenset({1}), frozenset({1}), output=True), HybridPlacement(BOTH, frozenset())):
        with hybrid(path, placement, threads=2, stream_slots=1) as runner:
            ours = continued(runner, IDS, tokens)
        assert kl_divergences(rows, ours).max() <= MAX_KL_OF_FLOATS
        assert ours.argmax(-1).tolist() == tokens


def test_what_the_gpu_has_is_not_read_for_the_cpu(folder: Path) -> None:
    """Neither when it is used nor ahead of time."""
    path = generated(folder, "mixtral")
    with hybrid(path, HybridPlacement.whole(model_of(path)), stream_slots=4) as runner:
        all_logits(runner, IDS)
        counts = runner.cache_counts
        assert counts is not None
        assert (counts.lookups, counts.bytes_read) == (0, 0)
    placement = HybridPlacement(BOTH, frozenset({1}), resident=frozenset({1}), expert_slots=6)
    with hybrid(path, placement, stream_slots=12) as runner:
        all_logits(runner, IDS)
        counts = runner.cache_counts
        assert counts is not None
        experts = model_of(path).layers[0].tensors()
        of_layer = sum(tensor.num_bytes for name, tensor in experts if name.endswith("_exps"))
        assert counts.bytes_read == of_layer


def test_experts_on_flash_are_brought_where_that_pays(folder: Path) -> None:
    path = generated(folder, "mixtral")
    tokens, rows = expected(path)
    placement = placed(expert_slots=2, seeds=(), brought_slots=6)
    slow_drive = ExpertRates(1e9, 1e9, 1e11, 1e12, 1e9, read_bytes_per_s=1e6)
    brought = {}
    for name, rates in (("fast", BRINGING_FROM_FLASH), ("slow", slow_drive), ("none", None)):
        with hybrid(path, placement, rates=rates, threads=2, stream_slots=6) as runner:
            ours = continued(runner, IDS, tokens)
            experts = runner._experts
            assert experts is not None
            brought[name] = experts.counts.bytes_read
        assert kl_divergences(rows, ours).max() <= MAX_KL_OF_FLOATS
    assert brought["fast"] > brought["slow"] == brought["none"]


def test_a_read_of_the_cpus_that_fails(folder: Path) -> None:
    path = generated(folder, "mixtral")
    whole = programs.logits_of(path, IDS)
    with hybrid(path, placed(expert_slots=0, seeds=()), threads=2, stream_slots=6) as runner:
        ours = logits_after_failed_reads(runner, IDS)
    assert kl_divergences(whole, ours).max() <= MAX_KL_OF_FLOATS


def test_the_engine_runs_such_a_plan() -> None:
    gpu = chosen_gpu("sim:vram=64MiB,bw=200GB/s,link=20GB/s,tflops=20")
    assert gpu is not None
    budget = Budget(2 << 30, 64 * MIB, "test", gpu.name)
    params = SamplingParams(temperature=0.0)
    with GGUFFile.open(DEMO_MODEL) as file:
        shape = ModelShape.from_gguf(file)
        plan = solve(question_here(file, Wish(256, 1, loop="hybrid"), budget, gpu=gpu))
        some, every = frozenset({0, 2}), frozenset(range(shape.block_count))
        split = Split(every, some, True, frozenset(), 6)
        tokens = {"context_tokens": 256, "chunk_tokens": plan.settings.prefill_chunk_tokens}
        plan = replace(
            plan,
            settings=replace(plan.settings, gpu_slots=6, stream_slots=20),
            placements=tuple(placements_of(shape, split, 256, streams=True)),
            needs=needs_of(shape, budget, plan.settings.device, split, **tokens, stream_slots=20),
        )
        check_runnable(plan, file)
    answers = []
    for options in ({"plan": plan}, {"context_tokens": 256, "threads": 1, "gpu": "off"}):
        with Engine(DEMO_MODEL, **options) as engine:
            pieces = engine.generate("Once upon a time", max_tokens=24, sampling=params)
            answers.append([piece.token_id for piece in pieces])
            if "plan" in options:
                found, on_gpu = engine.cache_counts, engine.expert_counts.gpu
                measured = engine.learn()
    assert answers[0] == answers[1]
    assert found is not None
    assert on_gpu is not None
    assert found.bytes_read > 0
    assert 0 < on_gpu.misses < on_gpu.lookups
    assert measured is not None
    assert measured.peak_gpu_bytes is not None
    assert measured.peak_gpu_bytes <= plan.needs.gpu.peak_bytes
