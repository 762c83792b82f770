"""Engines whose keys and values go to flash: the plan says so, answers are the same, a loss is made good or told."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cpu_kernels.kv_policy import KVPolicy
from offload import gguf_source
from offload.errors import PlanError, RequestError, SequenceError
from offload.gguf import GGUFFile
from planner.kv_spill import Spread, all_kv_bytes, cold_bytes, kv_ram_bytes, least_kv_ram_bytes, spread_in
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.plan_check import check_runnable
from runtime.engine import Engine
from runtime.executor.program import ProgramExecutor
from runtime.generation import Request
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams
from tests.support.command import strata
from tests.support.failing_reads import FailingReads
from tests.support.models import FAMILIES, prompt, write_model

GREEDY = SamplingParams(temperature=0)
CONTEXT = 4096
IDS = prompt(length=3800)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama.gguf", FAMILIES["llama"], "Q8_0")


@pytest.fixture(scope="module")
def least(path: Path) -> int:
    with GGUFFile.open(path) as file:
        return least_kv_ram_bytes(ModelShape.from_gguf(file), CONTEXT)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[int]:
    with Engine(path, threads=1, context_tokens=CONTEXT, gpu="off") as engine:
        return tokens(engine)


@pytest.fixture
def engine(path: Path, least: int) -> Iterator[Engine]:
    with Engine(path, threads=1, context_tokens=CONTEXT, gpu="off", kv_ram_bytes=least) as made:
        yield made


def tokens(engine: Engine) -> list[int]:
    return [piece.token_id for piece in engine.generate(IDS, sampling=GREEDY, max_tokens=6)]


def test_answers_are_the_same(engine: Engine, expected: list[int]) -> None:
    assert engine.plan.settings.kv_ram_bytes is not None
    assert any(note.startswith("KV: ") for note in engine.plan.notes)
    assert tokens(engine) == expected
    assert isinstance(engine.executor, ProgramExecutor)
    spill = engine.executor.kv_tiers.store.spill
    assert spill is not None
    assert spill.read_bytes > 0


def test_what_is_lost_is_computed_again(
    engine: Engine, expected: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)
    monkeypatch.setattr(gguf_source, "positional_read", FailingReads(8, 4 * (1 + gguf_source.EIO_RETRIES)))
    assert tokens(engine) == expected
    assert "they are computed again" in caplog.text


def test_a_drive_that_keeps_failing_ends_that_answer_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)
    monkeypatch.setattr(gguf_source, "positional_read", FailingReads(1, 10**9))
    requests = [Request(IDS[:200], GREEDY, (), 4), Request(IDS, GREEDY, (), 4)]
    answers = dict(engine.stream_batch(requests, parallel=1))
    assert isinstance(answers[1], SequenceError)
    assert len(answers[0].token_ids) == 4
    with pytest.raises(SequenceError, match="were lost"):
        tokens(engine)


def test_too_little_ram_is_refused(path: Path, least: int) -> None:
    with pytest.raises(RequestError, match=r"--kv-ram .* is too little for 4096 tokens"):
        Engine(path, threads=1, context_tokens=CONTEXT, gpu="off", kv_ram_bytes=least - 1)
    with pytest.raises(RequestError, match="has all keys and values in memory"):
        Engine(path, threads=1, context_tokens=CONTEXT, gpu="off", loop="sequential", kv_ram_bytes=least)


def test_its_plan_can_be_carried_out(engine: Engine, path: Path, least: int) -> None:
    plan = engine.plan
    with GGUFFile.open(path) as file:
        assert check_runnable(Plan.from_json(plan.to_json()), file) == plan
        less = tuple(
            replace(unit, num_bytes=(least - 2) // 2) if ".kv" in unit.unit else unit for unit in plan.placements
        )
        small = replace(plan, placements=less, settings=replace(plan.settings, kv_ram_bytes=least - 2))
        with pytest.raises(PlanError, match=f"4096 tokens of context need at least {least}"):
            check_runnable(small, file)
        needs = replace(plan.needs, ram=replace(plan.needs.ram, kv_bytes=0))
        with pytest.raises(PlanError, match=r"needs\.ram adds up to"):
            check_runnable(replace(plan, needs=needs), file)


def test_sizes(path: Path) -> None:
    with GGUFFile.open(path) as file:
        shape = ModelShape.from_gguf(file)
    every = all_kv_bytes(shape, CONTEXT)
    assert spread_in(shape, CONTEXT, every) == Spread(8, 8, 8)
    assert cold_bytes(shape, CONTEXT, every) == 0
    for pieces in range(1, 8):
        size = kv_ram_bytes(shape, CONTEXT, pieces)
        assert spread_in(shape, CONTEXT, size) == Spread(8, pieces, pieces)
        assert cold_bytes(shape, CONTEXT, size) == (8 - pieces) * every // 8


def test_the_command_keeps_to_the_ram_that_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Once upon a time there was a cat. " * 330, "utf-8")
    options = ["run", "-m", "demo", "-f", str(prompt), "--raw", "--temp", "0", "-n", "4", "-t", "2", "-c", "4096"]
    with GGUFFile.open(DEMO_MODEL) as file:
        shape = ModelShape.from_gguf(file)
    budgeted = shape.with_kv(KVPolicy(budget_tokens=4096))
    most = max(least_kv_ram_bytes(each, 4096) for each in (shape, budgeted))
    plain = strata(capsys, monkeypatch, *options, "-q", "-ctk", "f16", "-ctv", "f16")
    assert plain.code == 0
    for more in ([], ["--kv-budget", "4096"]):  # a budget for all changes no bit
        spilled = strata(capsys, monkeypatch, *options, "--kv-ram", str(most), *more)
        assert spilled.code == 0
        assert spilled.stdout == plain.stdout
        assert "on flash" in " ".join(spilled.stderr.split())
    chosen = strata(capsys, monkeypatch, *options, "--kv-ram", str(most), "--kv-budget", "256")
    assert chosen.code == 0
    assert "answers can differ" in " ".join(chosen.stderr.split())
    refused = strata(capsys, monkeypatch, *options, "--kv-ram", "1MiB")
    assert refused.code == 2
    assert "is too little for 4096 tokens" in " ".join(refused.stderr.split())
