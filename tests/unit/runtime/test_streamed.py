"""Experts that are read when they are needed: the same logits as from RAM, bit for bit, whatever is cached and how."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.expert_slots import ExpertSlots
from offload import prefetch_gate
from offload.errors import RequestError
from offload.flash import ReadMode
from offload.gguf_source import ByteSource
from offload.policies import PolicyName
from offload.prefetch_gate import PrefetchMode
from offload.trace_replay import replay
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor
from runtime.executor.program import executor as executor_module
from tests.support import models, programs
from tests.support.models import generated

NAMES = ("qwen3moe", "qwen2moe", "llama", "gemma3")
IDS = models.prompt(length=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def run(runner: ProgramExecutor) -> np.ndarray:
    """A prompt, then tokens one by one, then several, then two sequences side by side."""
    kv = runner.new_kv(64)
    parts = [runner.forward([Step(IDS[:20], kv)], logits="all")[0]]
    parts += [runner.forward([Step([token], kv)])[0] for token in IDS[20:26]]
    parts.append(runner.forward([Step(IDS[26:30], kv)], logits="all")[0])
    other = runner.new_kv(64)
    runner.forward([Step(IDS[5:9], other)])
    parts += runner.forward([Step([IDS[30]], kv), Step([IDS[31]], other)])
    return np.concatenate(parts)


@pytest.mark.parametrize("quant_type", ["F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_do_not_depend_on_the_cache(name: str, quant_type: str, folder: Path) -> None:
    path = generated(folder, name, quant_type)
    with programs.executor(path) as resident:
        wanted = run(resident)
        model = resident.model
    least, experts = (1, 1) if model.experts is None else (model.experts.used_count, model.experts.count)
    most = experts * model.block_count

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(
        slots=st.integers(least, most + 3),
        policy=st.sampled_from(list(PolicyName)),
        mode=st.sampled_from(list(ReadMode)),
        threads=st.integers(1, 2),
        chunk=st.integers(1, 32),
        prefetch=st.sampled_from([PrefetchMode.OFF, PrefetchMode.ON]),
    )
    def check(slots: int, policy: PolicyName, mode: ReadMode, threads: int, chunk: int, prefetch: PrefetchMode) -> None:
        options = {"policy": policy, "mode": mode, "threads": threads, "chunk_tokens": chunk, "prefetch": prefetch}
        with programs.streaming(path, slots, **options) as (runner, experts):
            np.testing.assert_array_equal(run(runner), wanted)
            counts = experts.cache.counts
        assert counts.misses + counts.read_ahead > 0
        assert counts.misses <= counts.lookups

    check()


def test_a_cache_of_all_experts_reads_each_once(folder: Path) -> None:
    path = generated(folder, "qwen3moe", "Q8_0")
    with programs.streaming(path, 10_000) as (runner, experts):
        for _ in range(3):
            run(runner)
        counts = experts.cache.counts
        slots = experts.cache.slots
        assert slots.slots == slots.layers * slots.experts
        assert counts.misses + counts.read_ahead <= slots.slots
        before = counts
        run(runner)
        assert experts.cache.counts.since(before).misses == 0


def test_routing_is_recorded_whether_streamed_or_not(folder: Path) -> None:
    path = generated(folder, "qwen3moe", "Q8_0")
    traces = []
    with programs.executor(path) as resident, programs.streaming(path, 8) as (streamed, _):
        for runner in (resident, streamed):
            recorder = runner.record_routing("model")
            plain = run(runner)
            traces.append(recorder.trace())
            assert recorder.trace().tokens == 20 + 6 + 4 + 4 + 2
            np.testing.assert_array_equal(plain, run(runner))
        assert resident.model.experts is not None
        assert traces[0].used == resident.model.experts.used_count
    np.testing.assert_array_equal(traces[0].topk_ids, traces[1].topk_ids)
    assert len(np.unique(traces[0].topk_ids)) > 2
    replayed = replay(traces[0], 10_000, PolicyName.LRU)
    with programs.streaming(path, 10_000) as (runner, streamed):
        run(runner)
        counts = streamed.cache.counts
    assert counts.misses + counts.read_ahead >= replayed.lookups - replayed.hits


def decoded(runner: ProgramExecutor, sequences: int, tokens: int) -> np.ndarray:
    """Logits of so many tokens of some sequences that advance together, (tokens, sequences, vocab)."""
    caches = [runner.new_kv(32) for _ in range(sequences)]
    rows = [[runner.forward([Step(IDS[number % 7 : number % 7 + 3], kv)])[0] for number, kv in enumerate(caches)]]
    for token in range(tokens):
        steps = [Step([IDS[(token + 5 * number) % len(IDS)]], kv) for number, kv in enumerate(caches)]
        rows.append(runner.forward(steps))
    return np.array(rows)[:, :, -1]


@pytest.mark.parametrize("prefetch", list(PrefetchMode))
@pytest.mark.parametrize("name", ["qwen3moe", "qwen2moe"])
def test_guesses_do_not_change_what_is_computed(
    name: str, prefetch: PrefetchMode, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting, value in (("WINDOW_TOKENS", 2), ("SETTLING_TOKENS", 0), ("KEPT_TOKENS", 4)):
        monkeypatch.setattr(prefetch_gate, setting, value)
    path = folder / f"{name}-4.gguf"  # with slots for two of four layers
    if not path.exists():
        models.write_model(path, replace(models.spec_of(name), blocks=4), "Q8_0")
    with programs.executor(path) as resident:
        wanted = decoded(resident, 1, 24)
        assert resident.model.experts is not None
        slots = 2 * resident.model.experts.count
    with programs.streaming(path, slots, prefetch=prefetch) as (runner, streamed):
        np.testing.assert_array_equal(decoded(runner, 1, 24), wanted)
        counts = streamed.cache.counts
    assert (counts.foreseen > 0) is (prefetch is not PrefetchMode.OFF)
    assert (counts.trial is not None) is (prefetch is PrefetchMode.AUTO)
    assert counts.foreseen_used <= counts.foreseen


def test_what_a_slow_thread_tells_of_a_slot_is_not_taken_for_its_next_owner(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ExpertSlots.landed

    def landed_late(slots: ExpertSlots, slot: int, part: int) -> None:
        time.sleep(0.001)
        told(slots, slot, part)

    path = folder / "qwen2moe-late.gguf"
    models.write_model(path, replace(models.spec_of("qwen2moe"), blocks=4), "Q8_0")
    with programs.executor(path) as resident:
        wanted = decoded(resident, 1, 24)
        assert resident.model.experts is not None
        slots = 2 * resident.model.experts.count
    monkeypatch.setattr(ExpertSlots, "landed", landed_late)
    with programs.streaming(path, slots, prefetch=PrefetchMode.ON) as (runner, _):
        np.testing.assert_array_equal(decoded(runner, 1, 24), wanted)


@pytest.mark.parametrize("prefetch", [PrefetchMode.OFF, PrefetchMode.ON])
@pytest.mark.parametrize("name", ["qwen3moe", "llama"])
def test_many_sequences_get_what_each_gets_alone(name: str, prefetch: PrefetchMode, folder: Path) -> None:
    path, sequences = generated(folder, name, "Q8_0"), 40
    with programs.executor(path) as resident:
        together = decoded(resident, sequences, 3)
        for number in (0, 7, 39):
            kv = resident.new_kv(32)
            rows = [resident.forward([Step(IDS[number % 7 : number % 7 + 3], kv)])[0][-1]]
            rows += [resident.forward([Step([IDS[(token + 5 * number) % len(IDS)]], kv)])[0][-1] for token in range(3)]
            np.testing.assert_array_equal(together[:, number], rows)
        experts = resident.model.experts
    slots = 2 if experts is None else experts.count
    with programs.streaming(path, slots, prefetch=prefetch) as (runner, _):
        np.testing.assert_array_equal(decoded(runner, sequences, 3), together)


def test_a_dense_model_has_no_routing_to_record(folder: Path) -> None:
    with (
        programs.executor(generated(folder, "llama", "Q8_0")) as runner,
        pytest.raises(RequestError, match="no routed experts"),
    ):
        runner.record_routing("model")


@pytest.mark.parametrize("name", ["qwen3moe", "llama"])
def test_a_cache_that_shrinks_and_grows_changes_nothing(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "LEAST_TOKENS", 2)
    monkeypatch.setattr(executor_module, "LEAST_LAYERS", 1)
    path = generated(folder, name, "Q8_0")
    with programs.executor(path) as resident:
        wanted = run(resident)
    with programs.streaming(path, 10_000) as (runner, streamed):
        everything = streamed.slots.slots
        np.testing.assert_array_equal(run(runner), wanted)
        given = runner.shrink_cache(1 << 40)
        assert given == (everything - streamed.cache.usable_slots) * streamed.slots.slot_bytes > 0
        np.testing.assert_array_equal(run(runner), wanted)
        half = streamed.slots.slot_bytes * (everything // 2)
        assert runner.shrink_cache(half) == half
        np.testing.assert_array_equal(run(runner), wanted)
        assert runner.shrink_cache(0) == 0
        np.testing.assert_array_equal(run(runner), wanted)
        before = streamed.cache.counts
        np.testing.assert_array_equal(run(runner), wanted)
        assert streamed.cache.counts.since(before).misses == 0, "all are there again"


def test_the_file_does_not_stay_in_ram_beside_streamed_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[Path] = []
    monkeypatch.setattr(ByteSource, "forget", lambda source: forgotten.append(source.path))
    path = generated(folder, "qwen3moe", "Q8_0")
    with programs.executor(path):
        assert forgotten == []
    with programs.streaming(path, slots=16):
        assert forgotten == [path]
