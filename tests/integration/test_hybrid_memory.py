"""What a hybrid plan says it needs of the GPU's memory, against what the executor takes of a simulated one."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_kernels.simulated import SimulatedDevice
from offload.gguf import GGUFFile
from offload.transfer import BUFFER_BYTES, BUFFERS
from planner.budget import MIB, Budget
from planner.hybrid_memory import TRANSFER_BUFFERS, TRANSFER_BYTES, kv_tokens
from planner.hybrid_needs import brought_slots, needs_of
from planner.hybrid_split import Split
from planner.model_shape import ModelShape
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from runtime.executor.program.runner import MAX_LANES
from runtime.models import DEMO_MODEL
from tests.support import models
from tests.support.hybrid import BRINGING, FAST_GPU

CONTEXT, CHUNK = 320, 128
SMALL_BYTES = 256 << 10  # that tables and buffers for small experts are overestimated by
LARGE = Budget(1 << 34, 64 * MIB, "test", "simulated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def shape_of(path: Path) -> ModelShape:
    with GGUFFile.open(path) as file:
        return ModelShape.from_gguf(file)


@st.composite
def splits(draw: st.DrawFn, shape: ModelShape) -> Split:
    """Any split, of as many layers as may be."""
    layers = range(shape.block_count)
    attention, feed_forward = (frozenset(draw(st.sets(st.sampled_from(layers)))) for _ in range(2))
    resident: frozenset[int] = frozenset()
    slots = 0
    if shape.expert_count and feed_forward:
        every = len(feed_forward) * shape.expert_count
        slots = draw(st.sampled_from([0, 1, every // 2, every]))
        resident = feed_forward if slots == every else resident
    return Split(attention, feed_forward, draw(st.booleans()), resident, slots)


def peak_bytes(path: Path, split: Split) -> int:
    """Of the GPU's memory, by a run with a full context, by many tokens and by one."""
    shape = shape_of(path)
    placement = HybridPlacement.of(split, split.seeds(shape), brought_slots(shape, LARGE, split))
    device = SimulatedDevice(FAST_GPU)
    with GGUFFile.open(path) as file:
        options = {"chunk_tokens": CHUNK, "context_tokens": kv_tokens(CONTEXT), "rates": BRINGING}
        runner = HybridExecutor(describe(file), file, placement, device, **options)
        kv = runner.new_kv(CONTEXT)
        runner.forward([Step([1 + token % 50 for token in range(CONTEXT - 2)], kv)])
        for token in (3, 4):
            runner.forward([Step([token], kv)])
        runner.close()
    return device.peak_bytes


def check(path: Path, split: Split) -> None:
    needs = needs_of(shape_of(path), LARGE, FAST_GPU, split, context_tokens=CONTEXT, chunk_tokens=CHUNK)
    planned, peak = needs.gpu.peak_bytes, peak_bytes(path, split)
    assert peak <= planned
    assert planned - peak <= 0.1 * planned + SMALL_BYTES


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "qwen2moe"])
def test_any_split(name: str, folder: Path) -> None:
    path = models.write_model(folder / f"{name}.gguf", models.spec_of(name), "F16")

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(split=splits(shape_of(path)))
    def run(split: Split) -> None:
        check(path, split)

    run()


@pytest.mark.parametrize("slots", [0, 20, 64])
def test_the_demo(slots: int) -> None:
    shape = shape_of(DEMO_MODEL)
    layers = frozenset(range(shape.block_count))
    resident = layers if slots == shape.block_count * shape.expert_count else frozenset()
    check(DEMO_MODEL, Split(layers, layers, True, resident, slots))


def test_the_constants_are_the_executors() -> None:
    assert (TRANSFER_BUFFERS, TRANSFER_BYTES) == (BUFFERS, BUFFER_BYTES)
    assert MAX_LANES <= CHUNK
