"""Experts in GPU memory: what tables name is there and whole, residents stay, and the cache follows what is used."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.waiting import Counter
from offload.errors import DeviceError, ModelFormatError
from offload.gguf_tensors import TensorInfo
from offload.gpu_slots import FETCHES, Key
from offload.policies import PolicyName
from offload.raw_experts import ExpertMatrix, GGUFExperts
from tests.support.raw_experts import DENSE_LAYER, EXPERTS, HIDDEN, INNER, LAYERS, RawExpertsFile, SlotsOnSimulatedGpu

WAIT_S = 20.0


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> RawExpertsFile:
    return RawExpertsFile(tmp_path_factory.mktemp("experts") / "experts.bin")


def tokens(*keys: Key, count: int = 1) -> NDArray[np.int64]:
    """A step in which these experts were used."""
    used = np.zeros((LAYERS, EXPERTS), np.int64)
    for key in keys:
        used[key] = count
    return used


def settle_until(gpu: SlotsOnSimulatedGpu, key: Key) -> None:
    """Steps go by until an expert is there."""
    end = time.monotonic() + WAIT_S
    while key not in gpu.resident():
        assert time.monotonic() < end
        time.sleep(0.001)
        gpu.slots.settle()


def test_seeds_are_there_first(file: RawExpertsFile) -> None:
    seeds = [(0, 1), (2, 5), (0, 1), (DENSE_LAYER, 0), (3, 0), (0, 2), (2, 2)]
    with SlotsOnSimulatedGpu(file, slots=4, seeds=seeds) as gpu:
        assert gpu.resident() == set()
        before = gpu.device.free_bytes
        gpu.slots.load()
        assert gpu.resident() == {(0, 1), (2, 5), (3, 0), (0, 2)}
        assert gpu.slots.places == 4
        gpu.check()
        assert gpu.device.free_bytes == before
        assert gpu.device.total_bytes - before > gpu.slots.num_bytes
        assert gpu.slots.counts.bytes_read == 3 * 3 * 64 * 34 + 2 * 3 * 64 * 34


def test_layers_that_are_alike_share_stacks(file: RawExpertsFile) -> None:
    with SlotsOnSimulatedGpu(file, slots=5, brought=2, seeds=[(3, 0)]) as gpu:
        assert gpu.slots.stacks(0) is gpu.slots.stacks(2)
        assert gpu.slots.stacks(3)[0].rows == 2 * gpu.slots.stacks(0)[0].rows
        assert gpu.slots.brought_from(0) + gpu.slots.brought_from(3) == gpu.slots.places == 5
        assert gpu.slots.stacks(0)[0].slots == gpu.slots.brought_from(0) + 2
    with SlotsOnSimulatedGpu(file, slots=1000) as gpu:
        assert gpu.slots.places == 3 * EXPERTS  # no more than there are experts


def test_residents_come_first_and_stay(file: RawExpertsFile) -> None:
    with SlotsOnSimulatedGpu(file, slots=EXPERTS + 1, resident=frozenset({2}), seeds=[(0, 3), (0, 4)]) as gpu:
        gpu.slots.load()
        residents = {(2, expert) for expert in range(EXPERTS)}
        assert gpu.resident() == residents | {(0, 3)}
        for _ in range(30):
            gpu.slots.used(tokens((0, 1), (2, 0)))
            gpu.slots.settle()
        settle_until(gpu, (0, 1))
        assert gpu.resident() == residents | {(0, 1)}
        gpu.check()
    with pytest.raises(ValueError, match="the 12 experts of resident layers need more than 11 slots"):
        SlotsOnSimulatedGpu(file, slots=11, resident=frozenset({0, 2}))


def test_what_is_used_often_comes_and_what_is_not_goes(file: RawExpertsFile) -> None:
    with SlotsOnSimulatedGpu(file, slots=2, seeds=[(0, 0), (0, 1)]) as gpu:
        gpu.slots.load()
        table = gpu.slots.table(0)
        address = table.ctypes.data
        for _ in range(4):
            gpu.slots.used(tokens((0, 0), (0, 5)))
            gpu.slots.settle()
        settle_until(gpu, (0, 5))
        assert gpu.resident() == {(0, 0), (0, 5)}
        assert table[5] >= 0
        assert gpu.slots.table(0).ctypes.data == address
        gpu.check()
        counts = gpu.slots.counts
        assert (counts.lookups, counts.misses, counts.read_ahead) == (8, 4, 1)
        assert counts.hit_rate == 0.5


def test_tables_change_between_steps_alone(file: RawExpertsFile) -> None:
    with SlotsOnSimulatedGpu(file, slots=2, seeds=[(0, 0)]) as gpu:
        gpu.slots.load()
        gpu.slots.used(tokens((0, 4)))
        assert gpu.resident() == {(0, 0)}
        gpu.slots.settle()
        load = gpu.slots._arriving[0, 4]
        assert load.outcome() is None
        assert gpu.resident() == {(0, 0)}
        gpu.slots.settle()
        assert gpu.resident() == {(0, 0), (0, 4)}


def test_few_experts_are_fetched_at_a_time(file: RawExpertsFile) -> None:
    with SlotsOnSimulatedGpu(file, slots=2 * EXPERTS) as gpu:
        gpu.slots.load()
        gpu.slots.used(tokens(*((0, expert) for expert in range(EXPERTS))))
        gpu.slots.settle()
        assert gpu.slots.counts.read_ahead == FETCHES


def test_an_expert_that_is_worth_no_more_does_not_come(file: RawExpertsFile) -> None:
    with SlotsOnSimulatedGpu(file, slots=1, seeds=[(0, 0)]) as gpu:
        gpu.slots.load()
        for _ in range(5):
            gpu.slots.used(tokens((0, 0), (0, 1)))
            gpu.slots.settle()
        assert gpu.resident() == {(0, 0)}
        assert gpu.slots.counts.read_ahead == 0


@pytest.mark.parametrize("policy", PolicyName)
@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 14),
    st.lists(
        st.lists(st.tuples(st.sampled_from([0, 2, 3]), st.integers(0, EXPERTS - 1)), min_size=1, max_size=5),
        max_size=12,
    ),
)
def test_any_order_of_use(file: RawExpertsFile, policy: PolicyName, slots: int, steps: list[list[Key]]) -> None:
    with SlotsOnSimulatedGpu(file, slots=slots, brought=2, seeds=[(0, 0), (3, 1)], policy=policy) as gpu:
        gpu.slots.load()
        for step in steps:
            layer = step[0][0]
            missing = sorted({expert for one, expert in step if one == layer and gpu.slots.table(one)[expert] < 0})[:2]
            places = gpu.slots.bring(layer, missing)
            assert gpu.slots.take_failure() is None
            assert all(gpu.is_whole(layer, *pair) for pair in zip(missing, places, strict=True))
            gpu.slots.used(tokens(*step))
            gpu.slots.settle()
            gpu.check()
        assert len(gpu.resident()) <= slots


def test_experts_are_brought_for_one_step(file: RawExpertsFile) -> None:
    with SlotsOnSimulatedGpu(file, slots=2, brought=2, seeds=[(0, 0)]) as gpu:
        gpu.slots.load()
        counter = Counter()
        call = counter.raise_call()
        for step, layer in enumerate((0, 2, 3), 1):
            places = gpu.slots.bring(layer, [4, 2])
            gpu.slots.call_when_brought(call.address, call.argument)
            counter.wait(step)
            first = gpu.slots.brought_from(layer)
            assert places == [first, first + 1]
            assert gpu.is_whole(layer, 4, first)
            assert gpu.is_whole(layer, 2, first + 1)
        assert gpu.slots.take_failure() is None
        assert gpu.resident() == {(0, 0)}
        gpu.slots.call_when_brought(call.address, call.argument)  # nothing was asked for
        counter.wait(4)
        with pytest.raises(ValueError, match="3 experts for the 2 places"):
            gpu.slots.bring(0, [1, 2, 3])


def test_no_room_on_the_gpu(file: RawExpertsFile) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        SlotsOnSimulatedGpu(file, slots=12, spec="sim:vram=64KiB,bw=1GB/s,link=1GB/s,tflops=1")


def test_bytes_are_looked_at_before_they_go_on(file: RawExpertsFile) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def look(tensor: TensorInfo, rows: NDArray[np.uint8]) -> None:
        seen.append((tensor.name, rows.shape))
        if len(seen) > 6:
            raise ModelFormatError(f"tensor {tensor.name} holds weights that are not finite numbers")

    with SlotsOnSimulatedGpu(file, slots=2, seeds=[(0, 1), (2, 3)], look=look) as gpu:
        with pytest.raises(ModelFormatError, match=r"blk\.2\.ffn_gate_exps\.weight holds weights"):
            gpu.slots.load()
        assert seen[:3] == [("blk.0.ffn_gate_exps.weight", (rows, 34)) for rows in (44, 20)] + [
            ("blk.0.ffn_up_exps.weight", (44, 34))
        ]


def test_closing_while_experts_are_on_their_way(file: RawExpertsFile) -> None:
    slow = "sim:vram=8MiB,bw=100GB/s,link=0.001GB/s,tflops=1"
    with SlotsOnSimulatedGpu(file, slots=12, brought=6, spec=slow) as gpu:
        counter = Counter()
        call = counter.raise_call()
        gpu.slots.bring(0, range(6))
        gpu.slots.call_when_brought(call.address, call.argument)
        gpu.slots.close()
        gpu.slots.close()
        counter.wait(1)
        failure = gpu.slots.take_failure()
        assert isinstance(failure, DeviceError)
        assert "was closed while it was brought" in str(failure)


def test_raw_experts_of_a_file(file: RawExpertsFile) -> None:
    source = GGUFExperts(file.tensors, read_bytes=1500)
    shape = (
        ExpertMatrix("Q8_0", INNER, HIDDEN),
        ExpertMatrix("Q8_0", INNER, HIDDEN),
        ExpertMatrix("Q8_0", HIDDEN, INNER),
    )
    assert source.matrices(0) == shape
    assert source.matrices(DENSE_LAYER) == ()
    assert source.most_bytes == 44 * 34
    for layer, expert in ((0, 0), (3, EXPERTS - 1)):
        for part in range(3):
            runs = [run for run in source.runs(layer, expert) if run.part == part]
            data = b"".join(
                file.data[run.extent.offset : run.extent.offset + run.extent.num_bytes].tobytes() for run in runs
            )
            assert data == file.raw(layer, part, expert).tobytes()
    dense = TensorInfo("blk.0.ffn_gate.weight", file.tensors[0][0].quant_type, (64, 32), 0, 0, 64 * 34)
    with pytest.raises(ValueError, match=r"'blk.0.ffn_gate.weight' of shape \(64, 32\) stacks no experts"):
        GGUFExperts({0: [dense]})
    assert Path(file.path).stat().st_size == len(file.data)
