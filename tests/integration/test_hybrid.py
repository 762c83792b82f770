"""The hybrid executor against the program executor: the same tokens, whatever part of a model a GPU computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from cpu_kernels.isa import current
from gpu_kernels.simulated import SimulatedDevice
from offload.gguf import GGUFFile
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from runtime.models import DEMO_MODEL
from runtime.streamed import GGUFBundles, StreamedWeights
from tests.support import models, programs, running
from tests.support.divergence import EXACT_TYPES, MAX_KL, MAX_KL_OF_FLOATS, kl_divergences
from tests.support.hybrid import (
    BRINGING,
    FAST_GPU,
    IDS,
    all_logits,
    continued,
    expected,
    greedy,
    hybrid,
    model_of,
    placements,
)
from tests.support.models import generated

NAMES = (
    *("llama", "mixtral", "qwen2", "qwen2moe", "qwen3moe", "olmoe", "bitnet", "gemma3", "phi3"),
    *("llama-biases", "gemma3-pattern", "phi3-long", "qwen3moe-scales", "qwen3-wide-heads"),
)
ROUTED = ("mixtral", "qwen2moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def check_random_placements(path: Path, count: int, bound: float, *, exact: bool) -> None:
    model, (tokens, rows) = model_of(path), expected(path)

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(placement=placements(model))
    def check(placement: HybridPlacement) -> None:
        with hybrid(path, placement, rates=BRINGING, threads=2) as runner:
            ours = continued(runner, IDS, tokens)
        assert kl_divergences(rows, ours).max() <= bound
        if exact:
            assert ours.argmax(-1).tolist() == tokens

    check()


@pytest.mark.parametrize("name", NAMES)
def test_any_placement_gives_the_cpus_tokens(name: str, folder: Path) -> None:
    check_random_placements(generated(folder, name), 3, MAX_KL_OF_FLOATS, exact=True)


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_any_placement_of_float16_weights(name: str, folder: Path) -> None:
    check_random_placements(generated(folder, name, "F16"), 2, MAX_KL_OF_FLOATS, exact=True)


@pytest.mark.parametrize("quant_type", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_any_placement_of_quantised_weights(name: str, quant_type: str, folder: Path) -> None:
    """The CPU rounds activations to 8 bits, the GPU does not: as far apart as the CPU is from the reference."""
    assert quant_type not in EXACT_TYPES
    check_random_placements(generated(folder, name, quant_type), 2, MAX_KL[False], exact=False)


def test_the_demo_on_both_devices() -> None:
    """All on the GPU it is the reference; in parts no farther from that than the CPU, which rounds activations."""
    model, prompt = model_of(DEMO_MODEL), list(range(100, 130))
    with programs.executor(DEMO_MODEL) as runner:
        tokens, rows = greedy(runner, prompt, 40)
    ids = [*prompt, *tokens[:-1]]
    reference = running.logits_of(DEMO_MODEL, ids, capacity_tokens=80, kv_dtype=torch.float16)[-40:]
    half = frozenset(range(0, model.block_count, 2))
    rounded = kl_divergences(reference, rows).max()
    for placement, bound in (
        (HybridPlacement.whole(model), MAX_KL_OF_FLOATS),
        (HybridPlacement(half, half, output=True), rounded),
    ):
        with hybrid(DEMO_MODEL, placement) as runner:
            assert kl_divergences(reference, continued(runner, prompt, tokens)).max() <= bound


def routed_placement(**options) -> HybridPlacement:
    """Both layers' experts on both devices."""
    both = frozenset({0, 1})
    seeds = tuple((layer, expert) for expert in range(0, 6, 2) for layer in (0, 1))
    return HybridPlacement(both, both, **{"output": True, "expert_slots": 6, "seeds": seeds, **options})


@pytest.mark.parametrize("quant_type", ["F32", "Q4_K"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2moe", "gemma3"])
def test_threads_change_no_bit(name: str, quant_type: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the same experts are on the GPU: those that are fetched land when they do."""
    monkeypatch.setattr("offload.gpu_slots.FETCHES", 0)
    path = generated(folder, name, quant_type)
    placement = routed_placement() if name in ROUTED else HybridPlacement(frozenset({1}), frozenset({0}), output=True)
    found = []
    for threads in (1, 2, 3):
        with hybrid(path, placement, threads=threads) as runner:
            kv = runner.new_kv(64)
            rows = [runner.forward([Step(IDS, kv)], logits="all")[0]]
            runner.set_threads(4 - threads)
            rows += [runner.forward([Step([token], kv)])[0] for token in (5, 6, 7)]
            found.append(np.concatenate(rows))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("name", ROUTED)
def test_where_an_expert_lies_on_the_gpu_changes_no_bit(name: str, folder: Path) -> None:
    path = generated(folder, name)
    model, both = model_of(path), frozenset({0, 1})
    forwards = tuple((layer, expert) for layer in (0, 1) for expert in range(6))
    same = [
        HybridPlacement.whole(model),
        HybridPlacement(both, both, output=True, expert_slots=12, seeds=forwards),
        HybridPlacement(both, both, output=True, expert_slots=12, seeds=forwards[::-1]),
        HybridPlacement(both, both, output=True, expert_slots=12, seeds=forwards[::-1], resident=frozenset({1})),
    ]
    found = []
    for placement in same:
        with hybrid(path, placement) as runner:
            found.append(all_logits(runner, IDS))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "phi3-long"])
def test_chunks_and_lanes(name: str, folder: Path) -> None:
    """In chunks, token by token, and beside other sequences: what the CPU alone gives."""
    path = generated(folder, name)
    whole = programs.logits_of(path, IDS)
    placement = HybridPlacement(frozenset({0}), frozenset({0, 1}), output=True, expert_slots=3 if name in ROUTED else 0)
    with hybrid(path, placement, threads=2, chunk_tokens=16) as runner:
        assert kl_divergences(whole, all_logits(runner, IDS)).max() <= MAX_KL_OF_FLOATS
        caches = [runner.new_kv(capacity) for capacity in (64, 40, 300)]
        for kv, start in zip(caches, (0, 7, 20), strict=True):
            if start:
                runner.forward([Step(IDS[:start], kv)], logits="none")
        steps = [
            runner.forward([Step([IDS[kv.length]], kv) for kv in caches if kv.length < 40 and kv.capacity_tokens < 300])
            for _ in range(20)
        ]
        first = np.concatenate([rows[0] for rows in steps])
        second = np.concatenate([rows[1] for rows in steps])
        assert kl_divergences(whole[:20], first).max() <= MAX_KL_OF_FLOATS
        assert kl_divergences(whole[7:27], second).max() <= MAX_KL_OF_FLOATS
        mixed = runner.forward([Step(IDS[20:], caches[2]), Step([IDS[20]], caches[0]), Step(IDS[27:], caches[1])])
        if name != "phi3-long":  # whose angles depend on the capacity
            assert kl_divergences(whole[[39, 20, 39]], np.concatenate(mixed)).max() <= MAX_KL_OF_FLOATS


def test_truncated_caches_go_on(folder: Path) -> None:
    path = generated(folder, "llama")
    whole = programs.logits_of(path, IDS)
    for ram_kv in (frozenset(), frozenset({0})):
        placement = HybridPlacement(frozenset({0, 1}), frozenset({1}), output=False, ram_kv=ram_kv)
        with hybrid(path, placement) as runner:
            kv = runner.new_kv(200)
            runner.forward([Step([*IDS, *range(20, 120)], kv)])
            blocks = len(kv.blocks)
            kv.truncate(25)
            assert len(kv.blocks) < blocks
            rest = runner.forward([Step(IDS[25:], kv)], logits="all")[0]
            assert kl_divergences(whole[25:], rest).max() <= MAX_KL_OF_FLOATS
            with pytest.raises(ValueError, match="truncating"):
                kv.truncate(41)


@pytest.mark.parametrize("name", ROUTED)
def test_routing_is_recorded_as_on_the_cpu(name: str, folder: Path) -> None:
    path = generated(folder, name)
    traces = []
    with programs.executor(path) as plain, hybrid(path, routed_placement(), threads=2) as runner:
        for executor in (plain, runner):
            recorder = executor.record_routing(name)
            kv = executor.new_kv(64)
            executor.forward([Step(IDS, kv)])
            executor.forward([Step([9], kv)])
            traces.append(recorder.trace())
    np.testing.assert_array_equal(traces[1].topk_ids, traces[0].topk_ids)


def test_experts_that_are_brought_are_counted(folder: Path) -> None:
    path = generated(folder, "mixtral")
    with hybrid(path, routed_placement(expert_slots=2, brought_slots=6), rates=BRINGING, threads=2) as runner:
        before = runner.gpu_expert_counts
        all_logits(runner, IDS)
        counts = runner.gpu_expert_counts
        assert before is not None
        assert counts is not None
        assert counts.lookups > counts.misses > 0
        assert counts.bytes_read > before.bytes_read


def test_closing_twice(folder: Path) -> None:
    with hybrid(generated(folder, "mixtral"), routed_placement()) as runner:
        runner.warm_up()
        runner.close()
        runner.close()


def test_saved_rows_are_the_same_on_both_devices(folder: Path) -> None:
    """Rows that one executor has saved are gone on with by the other."""
    path, ids = generated(folder, "gemma3"), [*IDS, *models.prompt(seed=3, length=100)]
    placement = HybridPlacement(frozenset({0, 2, 3}), frozenset({1}), output=False, ram_kv=frozenset({3}))
    expected = programs.logits_of(path, ids, capacity_tokens=200)
    with programs.executor(path) as plain, hybrid(path, placement) as runner:
        for saving, going_on in ((plain, runner), (runner, plain)):
            kv, other = saving.new_kv(200), going_on.new_kv(150)
            saving.forward([Step(ids[:130], kv)])
            assert kv.rows_layout == other.rows_layout
            data = np.empty(kv.rows_layout.block_bytes, np.uint8)
            for block in (1, 0):
                kv.export_block(block, data)
                other.import_block(block, data)
            other.restored(128)
            rest = going_on.forward([Step(ids[128:], other)], logits="all")[0]
            assert kl_divergences(expected[128:], rest).max() <= MAX_KL_OF_FLOATS


def test_hidden_states_behind_the_norm(folder: Path) -> None:
    path = generated(folder, "llama")
    with programs.executor(path) as plain, hybrid(path, HybridPlacement.whole(model_of(path))) as runner:
        found = []
        for executor in (plain, runner):
            executor.forward([Step(IDS, executor.new_kv(64))])
            found.append(executor.features(5))
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)


def test_experts_that_come_from_flash_for_the_cpu(folder: Path) -> None:
    """RAM holds few of them, the GPU others."""
    path = generated(folder, "mixtral")
    with GGUFFile.open(path) as file:
        model, isa = describe(file), current()
        streamed = StreamedWeights(GGUFBundles(file, model, isa), model, isa, slots=6)
        placement, device = routed_placement(expert_slots=4), SimulatedDevice(FAST_GPU)
        runner = HybridExecutor(model, file, placement, device, threads=2, streamed=streamed, context_tokens=64)
        ours = all_logits(runner, IDS)
        runner.close()
    assert kl_divergences(programs.logits_of(path, IDS), ours).max() <= MAX_KL_OF_FLOATS
