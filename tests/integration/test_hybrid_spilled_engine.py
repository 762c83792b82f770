"""Engines on a GPU whose keys and values go to RAM, and on to flash: answers are the same, also of sessions."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from offload import gguf_source, kv_chunks
from offload.gguf import GGUFFile
from planner.hybrid_needs import needs_of, placements_of
from planner.hybrid_split import split_of
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.plan_check import check_runnable
from runtime.engine import Engine
from runtime.executor.hybrid import HybridExecutor
from runtime.sampler import SamplingParams
from runtime.session_saved import SavedSession
from tests.support.failing_reads import FailingReads
from tests.support.models import prompt, spec_of, write_model
from tests.support.sessions import NAME, answer, tokens

CONTEXT = 6144
IDS = prompt(length=6000)
RAM_BYTES = 3 << 20
GPU = "sim:vram=11MiB,bw=10000GB/s,link=10000GB/s,tflops=1000,launch=0us,link_latency=0us"
GREEDY, SEEDED = SamplingParams(temperature=0), SamplingParams(temperature=0.8, seed=7)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama.gguf", spec_of("llama"), "F32")


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    """The GPU holds the newest tokens of a layer, RAM some of the others."""
    options = {"threads": 1, "context_tokens": CONTEXT, "cache_type_k": "f16", "cache_type_v": "f16"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_chunks, "RING_BYTES", 1)  # as little beside chunks of 256 KiB as it is beside larger ones
        with Engine(path, **options, gpu=GPU, loop="hybrid", kv_ram_bytes=RAM_BYTES) as made:
            yield made


@pytest.fixture(scope="module")
def expected(path: Path, engine: Engine) -> list[list[tuple[int, float]]]:
    with Engine(path, plan=in_memory(path, engine.plan)) as plain:
        return [drawn(plain, sampling) for sampling in (GREEDY, SEEDED)]


def in_memory(path: Path, plan: Plan) -> Plan:
    """The same placement with nothing on flash."""
    chosen = plan.settings
    with GGUFFile.open(path) as file:
        shape = ModelShape.from_gguf(file)
    split = split_of(shape, plan.placements, chosen.gpu_slots, chosen.gpu_kv_tokens)
    held = {"context_tokens": CONTEXT, "chunk_tokens": chosen.prefill_chunk_tokens}
    return replace(
        plan,
        settings=replace(chosen, kv_ram_bytes=None),
        placements=tuple(placements_of(shape, split, CONTEXT)),
        needs=needs_of(shape, plan.budget, chosen.device, split, **held),
    )


def drawn(engine: Engine, sampling: SamplingParams) -> list[tuple[int, float]]:
    return tokens(list(engine.generate(IDS, sampling=sampling, max_tokens=6)))


def read_bytes(engine: Engine) -> int:
    assert isinstance(engine.executor, HybridExecutor)
    spill = engine.executor.kv_tiers.store.spill
    assert spill is not None
    return spill.read_bytes


def test_the_plan_has_three_tiers_and_can_be_carried_out(engine: Engine, path: Path) -> None:
    plan = engine.plan
    assert plan.settings.kv_ram_bytes is not None
    assert plan.settings.kv_ram_bytes <= RAM_BYTES
    assert plan.settings.gpu_kv_tokens is not None
    assert any(note.startswith("KV: of what the GPU does not hold") for note in plan.notes)
    with GGUFFile.open(path) as file:
        assert check_runnable(Plan.from_json(plan.to_json()), file) == plan


def test_answers_are_the_same_to_the_bit(engine: Engine, expected: list[list[tuple[int, float]]]) -> None:
    assert [drawn(engine, sampling) for sampling in (GREEDY, SEEDED)] == expected
    assert read_bytes(engine) > 0


def test_what_is_lost_is_computed_again(
    engine: Engine,
    expected: list[list[tuple[int, float]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)
    monkeypatch.setattr(gguf_source, "positional_read", FailingReads(8, 4 * (1 + gguf_source.EIO_RETRIES)))
    assert [token for token, _ in drawn(engine, GREEDY)] == [token for token, _ in expected[0]]
    assert "they are computed again" in caplog.text


def test_sessions_leave_all_tiers_and_come_back(engine: Engine, tmp_path: Path) -> None:
    with SavedSession(NAME, tmp_path) as saved:
        pieces, _ = answer(engine, IDS, saved)
    turn = [*IDS, *(piece.token_id for piece in pieces), *prompt(seed=2, length=20)[1:]]
    wanted, _ = answer(engine, turn)
    before = read_bytes(engine)
    with SavedSession(NAME, tmp_path) as saved:
        found, computed = answer(engine, turn, saved)
    assert [piece.token_id for piece in found] == [piece.token_id for piece in wanted]
    assert computed < 100
    assert read_bytes(engine) > before
