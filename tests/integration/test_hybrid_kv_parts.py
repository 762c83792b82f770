"""Hybrid runs whose oldest keys and values lie in RAM, where the CPU attends over them beside the GPU."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpu_kernels.kv_layout import PIECE_TOKENS
from gpu_kernels.simulated import SimulatedDevice
from offload.gguf import GGUFFile
from planner.budget import MIB, Budget
from planner.gpu_choice import chosen_gpu
from planner.hybrid_needs import needs_of
from planner.hybrid_split import Split
from planner.model_shape import ModelShape
from planner.question import Here, Wish, ask
from planner.solve import solve
from runtime.architectures import describe
from runtime.backend import hybrid_executor
from runtime.executor import Step
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from runtime.executor.hybrid.kv import HybridKV
from tests.support import models, programs
from tests.support.divergence import max_kl_divergence
from tests.support.hybrid import FAST_GPU, hybrid, model_of
from tests.support.planning import profile

CAPACITY = 2048
IDS = models.prompt(length=1700)
LONG = [*IDS, *IDS, *IDS][:3600]
KL = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def path_of(folder: Path, name: str) -> Path:
    path = folder / f"{name}.gguf"
    return path if path.exists() else models.write_model(path, models.spec_of(name), "F32")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, folder: Path) -> Path:
    """Full attention; and windows, softcaps and norms of heads."""
    return path_of(folder, request.param)


@pytest.fixture(scope="module")
def runner(path: Path) -> Iterator[HybridExecutor]:
    with hybrid(path, HybridPlacement.whole(model_of(path)), chunk_tokens=256) as made:
        yield made


@pytest.fixture(scope="module")
def expected(path: Path) -> np.ndarray:
    """The CPU's own logits of the last tokens of every piece's worth of prompt."""
    with programs.executor(path) as plain:
        return plain.forward([Step(IDS, plain.new_kv(CAPACITY))], logits="all")[0]


def move(kv: HybridKV, pieces: int) -> None:
    """So many of the oldest pieces on the GPU go to RAM, as far as they may."""
    for _ in range(min(pieces, kv.movable_pieces)):
        kv.move_piece()


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    assert max_kl_divergence(wanted, found) <= KL
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.999  # exact ties aside


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)  # for each of two models
@given(
    parts=st.lists(st.tuples(st.integers(1, 700), st.integers(0, 3)), min_size=1, max_size=5),
    cut=st.none() | st.integers(0, 1500),
)
def test_any_pieces_in_ram(
    parts: list[tuple[int, int]], cut: int | None, runner: HybridExecutor, expected: np.ndarray
) -> None:
    """Prompts in parts, after each of which some pieces move; then tokens one by one, from wherever it was cut."""
    kv = runner.new_kv(CAPACITY)
    for tokens, pieces in parts:
        start, stop = kv.length, min(kv.length + tokens, len(IDS) - 4)
        if start < stop:
            check(runner.forward([Step(IDS[start:stop], kv)], logits="all")[0], expected[start:stop])
        move(kv, pieces)
    if cut is not None and cut < kv.length:
        kv.truncate(cut)
        assert kv.ram_tokens - PIECE_TOKENS < cut or kv.ram_tokens == 0
    for _ in range(4):
        start = kv.length
        check(runner.forward([Step(IDS[start : start + 1], kv)])[0], expected[start : start + 1])


def test_sequences_beside_each_other(runner: HybridExecutor, expected: np.ndarray) -> None:
    """Each keeps its bits whatever of the others lies where."""
    lengths, moved = [1300, 40, 700], [2, 0, 1]
    alone, together = [], []
    for results in (alone, together):
        caches = [runner.new_kv(CAPACITY) for _ in lengths]
        for kv, length, pieces in zip(caches, lengths, moved, strict=True):
            runner.forward([Step(IDS[:length], kv)])
            move(kv, pieces)
            assert kv.ram_pieces == pieces
        for step in range(3):
            steps = [Step([IDS[length + step]], kv) for length, kv in zip(lengths, caches, strict=True)]
            groups = [steps] if results is together else [[one] for one in steps]
            results.append(np.concatenate([row for group in groups for row in runner.forward(group)]))
    for step, (one, other) in enumerate(zip(alone, together, strict=True)):
        np.testing.assert_array_equal(one, other)
        check(other, expected[[length + step for length in lengths]])


def test_saved_rows_are_the_same_bytes_and_are_restored(runner: HybridExecutor, expected: np.ndarray) -> None:
    kv, other = runner.new_kv(CAPACITY), runner.new_kv(CAPACITY)
    runner.forward([Step(IDS[:1600], kv)])
    size = kv.rows_layout.block_bytes
    before, after = (np.zeros((25, size), np.uint8) for _ in range(2))
    for index in range(25):
        kv.export_block(index, before[index])
    move(kv, 2)
    for index in range(25):
        kv.export_block(index, after[index])
    np.testing.assert_array_equal(before, after)
    for index in range(25):
        other.import_block(index, before[index])
        move(other, index % 2)
    other.restored(1600)
    assert other.ram_pieces > 0
    check(runner.forward([Step(IDS[1600:1602], other)], logits="all")[0], expected[1600:1602])


@pytest.mark.parametrize("kv_tokens", [640, 1024])
def test_a_pool_that_may_not_grow(path: Path, expected: np.ndarray, kv_tokens: int) -> None:
    """What a plan says: the oldest pieces of whichever sequence has most go to RAM when they must."""
    placement = HybridPlacement(frozenset({0, 1}), frozenset({1}), output=True, kv_tokens=kv_tokens)
    with hybrid(path, placement, chunk_tokens=128, context_tokens=4096) as runner:
        held = runner._pool.num_bytes
        kv, other = runner.new_kv(CAPACITY), runner.new_kv(CAPACITY)
        for cache in (kv, other):
            check(runner.forward([Step(IDS[:1500], cache)], logits="all")[0], expected[:1500])
        for step in range(1500, 1510):
            rows = runner.forward([Step([IDS[step]], kv), Step([IDS[step]], other)])
            check(np.concatenate(rows), expected[[step, step]])
        assert kv.ram_pieces >= 1
        assert runner._pool.num_bytes <= max(held, held * 1216 // kv_tokens)  # what both need at least


def gpu_limited(path: Path, limit_bytes: int) -> tuple[HybridExecutor, SimulatedDevice]:
    """All on a GPU of so many bytes, which has room for few tokens at first."""
    device = SimulatedDevice(FAST_GPU, limit_bytes=limit_bytes)
    with GGUFFile.open(path) as file:
        model = describe(file)
        placement = HybridPlacement.whole(model)
        return HybridExecutor(model, file, placement, device, chunk_tokens=64, context_tokens=64), device


def test_a_gpu_without_room_for_all_keys_and_values(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a run: no layer is given up, and the GPU's memory is kept to."""
    path = path_of(folder, "llama")
    whole, device = gpu_limited(path, 1 << 30)
    whole.forward([Step(IDS[:900], whole.new_kv(CAPACITY))])
    whole.close()
    limit = device.peak_bytes
    runner, device = gpu_limited(path, limit)
    with caplog.at_level(logging.INFO, "strata"), programs.executor(path) as plain:
        wanted = plain.forward([Step(IDS, plain.new_kv(CAPACITY))], logits="all")[0]
        kv = runner.new_kv(CAPACITY)
        check(runner.forward([Step(IDS, kv)], logits="all")[0], wanted)
    runner.close()
    assert kv.ram_pieces > 0
    assert not runner.placement.ram_kv
    assert device.peak_bytes <= limit
    assert any("the oldest of which go to RAM" in record.message for record in caplog.records)
    assert any("512 tokens at a time" in record.message for record in caplog.records)


def test_memory_that_is_given_back_keeps_what_was_there(runner: HybridExecutor, expected: np.ndarray) -> None:
    """Blocks at the end of the pool move to free ones, and old pieces to RAM."""
    kv, other = runner.new_kv(CAPACITY), runner.new_kv(CAPACITY)
    for cache in (other, kv):
        runner.forward([Step(IDS[:1200], cache)])
    other.truncate(64)
    pool = runner._pool
    held = pool.num_bytes
    while pool.shrink():
        assert pool.num_bytes < held
        held = pool.num_bytes
    assert kv.ram_pieces == 2
    for cache, length in ((kv, 1200), (other, 64)):
        check(runner.forward([Step([IDS[length]], cache)])[0], expected[length : length + 1])


@pytest.mark.parametrize("limit", [1024, 1536])
def test_what_a_plan_needs_of_the_gpu_is_what_is_used(path: Path, limit: int) -> None:
    with GGUFFile.open(path) as file:
        shape = ModelShape.from_gguf(file)
    layers = frozenset(range(shape.block_count))
    split = Split(layers, layers, output=True, kv_tokens=limit)
    budget = Budget(1 << 34, 64 * MIB, "test", "simulated")
    planned = needs_of(shape, budget, FAST_GPU, split, context_tokens=CAPACITY, chunk_tokens=128).gpu.peak_bytes
    placement = HybridPlacement(layers, layers, output=True, kv_tokens=limit)
    device = SimulatedDevice(FAST_GPU)
    with GGUFFile.open(path) as file:
        runner = HybridExecutor(describe(file), file, placement, device, chunk_tokens=128, context_tokens=CAPACITY)
        kv = runner.new_kv(CAPACITY)
        runner.forward([Step(IDS, kv)])
        runner.forward([Step([1], kv)])
        runner.close()
    assert kv.ram_pieces > 0
    assert device.peak_bytes <= planned <= 1.1 * device.peak_bytes + (1 << 20)  # of positions not all have angles


@pytest.mark.parametrize("vram_mib", [7, 10])
def test_a_plan_for_a_gpu_that_cannot_hold_the_context(folder: Path, vram_mib: int) -> None:
    """Planned, run as planned within the simulated GPU's memory, and the same answer as the CPU's."""
    path = path_of(folder, "llama")
    gpu = chosen_gpu(f"sim:vram={vram_mib}MiB,bw=1000GB/s,link=100GB/s,tflops=60")
    assert gpu is not None
    budget = Budget(8 << 30, gpu.free_bytes, "test", gpu.name)
    with GGUFFile.open(path) as file:
        plan = solve(ask(file, budget, Here(profile(), gpu), Wish(4096, 1, loop="hybrid")))
        kept = plan.settings.gpu_kv_tokens
        assert kept is not None
        runner = hybrid_executor(file, plan)
        try:
            assert runner.placement.attention
            kv = runner.new_kv(4096)
            runner.forward([Step(LONG, kv)], logits="none")
            found = [runner.forward([Step([token], kv)])[0][-1] for token in IDS[:4]]
            assert kv.ram_tokens >= len(LONG) - kept
            assert runner.gpu_bytes <= plan.predicted.peak_gpu_bytes
            assert not runner.placement.ram_kv
        finally:
            runner.close()
    with programs.executor(path) as plain:
        alone = plain.new_kv(4096)
        plain.forward([Step(LONG, alone)], logits="none")
        check(np.stack(found), np.stack([plain.forward([Step([token], alone)])[0][-1] for token in IDS[:4]]))
