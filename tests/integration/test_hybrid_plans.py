"""Hybrid plans through the engine and the command: planned for a simulated GPU, run as planned, told as simulated."""

import json
from dataclasses import replace

import pytest

from offload.gguf import GGUFFile
from planner.budget import MIB, Budget
from planner.gpu_choice import chosen_gpu
from planner.hybrid_needs import needs_of, placements_of
from planner.hybrid_split import Split
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.question import Wish
from planner.solve import question_here, solve
from runtime.engine import Engine
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.speculative.options import DraftOptions
from tests.support.command import strata

SIMULATED = "sim:vram={vram}MiB,bw=200GB/s,link=20GB/s,tflops=20"
PROMPT = "Once upon a time"
TOKENS = 24  # before the kernels of both devices, which round otherwise, part ways


def hybrid(vram_mib: int) -> Plan:
    """A plan with as much on a simulated GPU as fits there."""
    gpu = chosen_gpu(SIMULATED.format(vram=vram_mib))
    assert gpu is not None
    budget = Budget(2 << 30, vram_mib * MIB, "test", gpu.name)
    with GGUFFile.open(DEMO_MODEL) as gguf:
        return solve(question_here(gguf, Wish(256, 1, loop="hybrid"), budget, gpu=gpu))


def all_on_gpu(plan: Plan, slots: int) -> Plan:
    """The same with all parts on the GPU, where experts have so many slots: those of all, or some to be shared."""
    with GGUFFile.open(DEMO_MODEL) as gguf:
        shape = ModelShape.from_gguf(gguf)
    layers = frozenset(range(shape.block_count))
    resident = layers if slots == shape.block_count * shape.expert_count else frozenset()
    split = Split(layers, layers, True, resident, slots)
    settings = replace(plan.settings, gpu_slots=slots)
    tokens = {"context_tokens": settings.context_tokens, "chunk_tokens": settings.prefill_chunk_tokens}
    needs = needs_of(shape, plan.budget, settings.device, split, **tokens)
    placements = tuple(placements_of(shape, split, settings.context_tokens))
    return replace(plan, settings=settings, placements=placements, needs=needs)


def answer(engine: Engine) -> list[int]:
    pieces = engine.generate(PROMPT, max_tokens=TOKENS, sampling=SamplingParams(temperature=0.0))
    return [piece.token_id for piece in pieces]


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What the CPU alone answers."""
    with Engine(DEMO_MODEL, context_tokens=256, threads=1, gpu="off") as engine:
        assert engine.plan.settings.loop == "program"
        return answer(engine)


@pytest.mark.parametrize("vram_mib", [8, 14, 64])
def test_answers_are_those_of_the_cpu_and_memory_is_as_planned(vram_mib: int, expected: list[int]) -> None:
    plan = hybrid(vram_mib)
    assert plan.settings.loop == "hybrid"
    with Engine(DEMO_MODEL, plan) as engine:
        assert answer(engine) == expected
        measured = engine.learn()
    assert measured is not None
    assert measured.peak_gpu_bytes is not None
    assert 0 < measured.peak_gpu_bytes <= plan.needs.gpu.needed_bytes <= vram_mib * MIB


@pytest.mark.parametrize("slots", [0, 20, 64])
def test_experts_are_found_on_the_gpu_or_computed_beside_it(slots: int, expected: list[int]) -> None:
    plan = all_on_gpu(hybrid(64), slots)
    with Engine(DEMO_MODEL, plan) as engine:
        assert answer(engine) == expected
        counts, measured = engine.expert_counts.gpu, engine.learn()
    assert counts is not None
    assert (counts.lookups > 0) == (slots > 0)
    assert (counts.misses > 0) == (0 < slots < 64)
    assert measured is not None
    assert measured.peak_gpu_bytes is not None
    assert 0 < measured.peak_gpu_bytes <= plan.needs.gpu.needed_bytes


def test_the_command_says_what_is_simulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SIMULATED.format(vram=64)
    model = ("-m", "demo", "--gpu", gpu, "--loop", "hybrid", "-c", "256")
    short = (*model, "-p", PROMPT, "-n", "8", "--temp", "0")
    plan = json.loads(strata(capsys, monkeypatch, "plan", *model, "--json").stdout)
    assert "simulated" in plan["machine"]["gpu"]
    assert plan["settings"]["device"] == gpu
    shown = strata(capsys, monkeypatch, "run", *short).stderr
    assert "on a simulated GPU" in shown
    assert "so are these speeds" in shown
    document = json.loads(strata(capsys, monkeypatch, "run", *short, "--json", "-q").stdout)
    assert "simulated" in document["gpu"]
    table = strata(capsys, monkeypatch, "bench", *model, "-p", "8", "-n", "4", "-r", "1", "-o", "json").stdout
    row = json.loads(table)[0]
    assert "simulated" in row["backend"]
    assert "simulated" in row["gpu_info"]


@pytest.mark.parametrize("slots", [20, 64])
def test_drafts_keep_the_answer_where_devices_share_experts(slots: int, expected: list[int]) -> None:
    with Engine(DEMO_MODEL, all_on_gpu(hybrid(64), slots), draft=DraftOptions("ngram", forced=True)) as engine:
        assert answer(engine) == expected
