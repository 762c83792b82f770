"""Programs over caches of every type: bits that depend on nothing beside, exact truncation, memory, refusals."""

from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import PlanError, RequestError
from runtime.engine import Engine
from runtime.executor import Step
from runtime.executor.base import WindowedKV
from runtime.executor.program import ProgramExecutor, ProgramKV
from runtime.models import DEMO_MODEL
from runtime.session import Session
from tests.support import models, programs

IDS = (models.prompt(length=50) * 4)[:170]  # more than two blocks
POLICIES = [
    KVPolicy(KVType.Q8_0, KVType.Q8_0),
    KVPolicy(KVType.Q4_0, KVType.BF16, keeps_edges=False),
    KVPolicy(KVType.KIVI2, KVType.KIVI4, keeps_edges=False),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return models.write_model(folder / "gemma3.gguf", models.spec_of("gemma3"))  # windows, two kinds of angles


def in_chunks(runner: ProgramExecutor, kv: ProgramKV, ids: list[int], chunk: int) -> np.ndarray:
    parts = [
        runner.forward([Step(ids[first : first + chunk], kv)], logits="all")[0] for first in range(0, len(ids), chunk)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_chunks_threads_and_lanes_change_no_bit(policy: KVPolicy, model: Path) -> None:
    with programs.executor(model, threads=2, kv_policy=policy) as runner:
        whole = in_chunks(runner, runner.new_kv(200), IDS, len(IDS))
        for chunk, threads in ((1, 2), (7, 1), (64, 3)):
            runner.set_threads(threads)
            np.testing.assert_array_equal(in_chunks(runner, runner.new_kv(200), IDS, chunk), whole)
        lanes = [runner.new_kv(200) for _ in range(3)]
        for number, kv in enumerate(lanes):
            runner.forward([Step(IDS[: 60 + number], kv)], logits="none")
        for _ in range(8):
            rows = runner.forward([Step([IDS[kv.length]], kv) for kv in lanes])
            for row, kv in zip(rows, lanes, strict=True):
                np.testing.assert_array_equal(row[0], whole[kv.length - 1])
    with programs.executor(model) as plain:
        assert (in_chunks(plain, plain.new_kv(200), IDS, 170) != whole).any(), "the types are used"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_what_is_taken_back_leaves_no_trace(policy: KVPolicy, model: Path) -> None:
    with programs.executor(model, kv_policy=policy) as runner:
        whole = in_chunks(runner, runner.new_kv(200), IDS, len(IDS))
        kv = runner.new_kv(200)
        runner.forward([Step(IDS[:120], kv)], logits="none")
        for drafts in (1, 5, 16):
            runner.forward([Step([3] * drafts, kv)], logits="none")
            kv.truncate(120)
        np.testing.assert_array_equal(in_chunks(runner, kv, IDS[120:], 11), whole[120:])
        assert isinstance(kv, WindowedKV)
        for length in (169, 127, 70, 64, 30):
            kept = kv.cut_at(length)
            assert length - 64 < kept <= length
            kv.truncate(kept)
            np.testing.assert_array_equal(in_chunks(runner, kv, IDS[kept:], 50), whole[kept:])


def test_a_cut_that_cannot_be_is_refused_and_a_session_avoids_it(model: Path) -> None:
    with programs.executor(model, kv_policy=POLICIES[2]) as runner:
        session = Session(runner.new_kv(200))
        session.rewind_to(IDS)
        runner.forward([Step(IDS, session.kv)], logits="none")
        with pytest.raises(ValueError, match="cut at 0"):
            session.kv.truncate(40)
        assert session.rewind_to([*IDS[:100], 3, 4]) == 100
        runner.forward([Step(IDS[100:130], session.kv)], logits="none")
        assert session.rewind_to([*IDS[:40], 3, 4]) == 0


def test_blocks_of_rows_go_to_another_cache(model: Path) -> None:
    with programs.executor(model, kv_policy=POLICIES[2]) as runner:
        kv, other = runner.new_kv(200), runner.new_kv(400)
        whole = in_chunks(runner, kv, IDS, len(IDS))
        assert kv.final_tokens == 128
        data = np.empty(kv.rows_layout.block_bytes, np.uint8)
        assert "kivi2/kivi4 in every layer" in kv.rows_layout.name
        for index in range(2):
            kv.export_block(index, data)
            other.import_block(index, data)
        other.restored(128)
        np.testing.assert_array_equal(in_chunks(runner, other, IDS[128:], 9), whole[128:])


def test_first_and_last_layer_keep_eight_bits() -> None:
    policy = KVPolicy(KVType.KIVI2, KVType.F16)
    types = [policy.of_layer(layer, 4) for layer in range(4)]
    assert types[0] == types[3] == (KVType.Q8_0, KVType.F16)
    assert types[1] == types[2] == (KVType.KIVI2, KVType.F16)
    assert KVPolicy(KVType.Q4_0, KVType.Q4_0).of_layer(0, 1) == (KVType.Q8_0, KVType.Q8_0)


def test_bytes_of_a_cache() -> None:
    def share(kind: KVType) -> float:
        cache = ProgramKV(16, 8, 64, 64, 4096, KVPolicy(kind, kind, keeps_edges=False))
        return cache.num_bytes / ProgramKV(16, 8, 64, 64, 4096).num_bytes

    assert share(KVType.Q8_0) <= 0.54
    assert share(KVType.Q4_0) <= 0.30
    assert share(KVType.KIVI4) <= 0.30
    assert share(KVType.KIVI2) <= 0.22


def test_an_engine_keeps_what_it_is_told() -> None:
    with Engine(DEMO_MODEL, threads=1, context_tokens=128, cache_type_k="q8_0", cache_type_v="q4_0") as engine:
        assert engine.plan.settings.kv == KVPolicy(KVType.Q8_0, KVType.Q4_0)
        kv = engine.executor.new_kv(128)
        assert isinstance(kv, ProgramKV)
        assert kv.layout.layers[1].value_type is KVType.Q4_0
        placed = sum(place.num_bytes for place in engine.plan.placements if place.unit.endswith(".kv"))
        assert placed == kv.num_bytes == engine.plan.needs.ram.kv_bytes
    with pytest.raises(RequestError, match="cache_type_v 'q9'"):
        Engine(DEMO_MODEL, cache_type_v="q9")
    with pytest.raises(PlanError, match="the sequential loop keeps f16"):
        Engine(DEMO_MODEL, loop="sequential", cache_type_k="q8_0")
