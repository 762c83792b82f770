"""Experts from flash and keys and values on flash at once: logits are those of a model that is all in RAM."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.flash import ReadMode
from offload.gguf import GGUFFile
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from offload.prefetch_gate import PrefetchMode
from planner.kv_spill import least_kv_ram_bytes
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.plan_check import check_runnable
from planner.solve import plan_here
from planner.streamed import least_slots, streamed_needs
from planner.ways import PROGRAM, WAYS, fit_way, placements
from runtime.engine import Engine
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV
from runtime.executor.program.kv_tiers import KVTiers
from runtime.sampler import SamplingParams
from tests.support import models, programs
from tests.support.spilled import assert_grow_together, plain_logits, run, spilling

TOKENS = 1500  # three pieces
IDS = models.prompt(length=TOKENS + 80)
SLOT_BYTES = 1 << 20
ALL = 10_000  # slots for every expert


@pytest.fixture(scope="module", params=["qwen3moe", "llama"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "m.gguf", models.spec_of(request.param), "Q8_0")


def decoded(executor: ProgramExecutor, kv: ProgramKV, start: int) -> NDArray[np.float32]:
    """Logits of two tokens one by one, then of some at once."""
    kv.truncate(start)
    rows = [run(executor, kv, [IDS[kv.length]]) for _ in range(2)]
    return np.concatenate([*rows, *executor.forward([Step(IDS[kv.length : kv.length + 8], kv)], logits="all")])


@pytest.mark.parametrize("mode", list(ReadMode))
@pytest.mark.parametrize("kind", [KVType.F16, KVType.Q8_0])
def test_any_chunks_and_any_experts_may_lie_on_flash(path: Path, kind: KVType, mode: ReadMode) -> None:
    policy, start = KVPolicy(kind, kind), 1472
    tiers = KVTiers(ChunkStore(SpillFile(path.parent, SLOT_BYTES, mode=mode)))
    with programs.streaming(path, ALL, kv_tiers=tiers, mode=mode) as (executor, streamed):
        model, cache, store = executor.model, streamed.cache, executor.kv_tiers.store
        kv = executor.new_kv(TOKENS + 64, policy)
        run(executor, kv, IDS[:start])
        expected = decoded(executor, kv, start)
        least, most = (1, model.block_count - 1)
        if model.experts is not None:
            least, most = min(8 * model.experts.used_count, model.experts.count), 2 * model.experts.count

        @settings(max_examples=25, deadline=None, derandomize=True)
        @given(
            cold=st.sets(st.tuples(st.integers(0, model.block_count - 1), st.integers(0, 1)), min_size=1),
            slots=st.integers(least, most),
            prefetch=st.sampled_from([PrefetchMode.OFF, PrefetchMode.ON]),
            threads=st.integers(1, 2),
        )
        def check(cold: set[tuple[int, int]], slots: int, prefetch: PrefetchMode, threads: int) -> None:
            cache.resize(slots)
            executor.set_prefetch(prefetch)
            executor.set_threads(threads)
            kv.truncate(start)
            for layer, piece in cold:
                kv.save(piece)
                store.evict(kv.chunks(layer)[piece])
            assert np.array_equal(decoded(executor, kv, start), expected)
            for layer, piece in cold:
                assert kv.chunks(layer)[piece].memory is None
                store.bring(kv.chunks(layer)[piece])

        before = cache.counts
        check()
        assert cache.counts.since(before).bytes_read > 0
        assert store.spill is not None
        assert store.spill.read_bytes > 0


def test_sequences_move_to_flash_as_they_grow(path: Path) -> None:
    expected = plain_logits(path, TOKENS, 2)
    with spilling(path, 3, slots=50) as executor:
        assert_grow_together(executor, TOKENS, expected)
        assert executor.kv_tiers.cold_pieces >= 2


def test_a_plan_with_both_gives_the_same_answer(path: Path) -> None:
    with GGUFFile.open(path) as file:
        plan = plan_here(file, context_tokens=4096, threads=1, gpu="off")
        shape = ModelShape.from_gguf(file)
        slots, least = least_slots(shape, 64), least_kv_ram_bytes(shape, 4096)
        fit = fit_way(shape, plan.budget, WAYS[PROGRAM][-1], 4096, least)
        assert fit is not None
        held = {"context_tokens": 4096, "chunk_tokens": 64, "slots": slots, "kv_ram_bytes": least}
        both = replace(
            plan,
            settings=replace(plan.settings, prefill_chunk_tokens=64, stream_slots=slots, kv_ram_bytes=least),
            needs=streamed_needs(shape, plan.budget, **held),
            placements=placements(shape, replace(fit, stream_slots=slots)),
        )
        assert check_runnable(Plan.from_json(both.to_json()), file) == both
    answers = []
    for chosen in (plan, both):
        with Engine(path, plan=chosen) as engine:
            ids, greedy = models.prompt(length=3800), SamplingParams(temperature=0)
            answers.append([piece.token_id for piece in engine.generate(ids, sampling=greedy, max_tokens=6)])
            executor = engine.executor
    assert answers[0] == answers[1]
    assert isinstance(executor, ProgramExecutor)
    assert executor.kv_tiers.store.spill is not None
    assert executor.kv_tiers.store.spill.read_bytes > 0
    assert executor.cache_counts is not None
    assert executor.cache_counts.bytes_read > 0
