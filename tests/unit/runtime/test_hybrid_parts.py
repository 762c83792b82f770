"""The parts of the hybrid executor: placements, tasks, blocks of keys and values, inputs of a step, rates."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cpu_kernels.kv_policy import KVPolicy
from gpu_kernels.simulated import SimulatedDevice
from offload.errors import ModelFormatError, UnsupportedModelError
from offload.tiers import Device
from runtime.architectures import Model
from runtime.executor import Step
from runtime.executor.hybrid import HybridPlacement
from runtime.executor.hybrid.kv import HybridKV
from runtime.executor.hybrid.kv_pool import BLOCK_TOKENS, KVPool, blocks_of
from runtime.executor.hybrid.recording import Recording
from runtime.executor.hybrid.step_inputs import StepInputs, StepShape
from runtime.executor.hybrid.tasks import Work, gpu_matrices, resident_matrices, tasks_of
from tests.faults.test_row_09_weights_that_are_not_numbers import damaged
from tests.support import models
from tests.support.hybrid import FAST_GPU, hybrid, model_of


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of(models.write_model(tmp_path_factory.mktemp("m") / "a.gguf", models.spec_of("llama")))


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of(models.write_model(tmp_path_factory.mktemp("m") / "b.gguf", models.spec_of("qwen2moe")))


@pytest.mark.parametrize(
    ("placement", "name"),
    [
        (HybridPlacement(frozenset({2})), "attention"),
        (HybridPlacement(feed_forward=frozenset({-1})), "feed_forward"),
        (HybridPlacement(frozenset({0}), ram_kv=frozenset({1})), "ram_kv"),
        (HybridPlacement(frozenset({0}), kv_tokens=0), "kv_tokens is 0"),
        (HybridPlacement(resident=frozenset({0})), "resident"),
        (HybridPlacement(feed_forward=frozenset({0}), resident=frozenset({0}), expert_slots=5), "5 slots"),
        (HybridPlacement(feed_forward=frozenset({0}), expert_slots=5, seeds=((1, 0),)), "expert 0 of layer 1"),
        (HybridPlacement(feed_forward=frozenset({0}), expert_slots=5, seeds=((0, 6),)), "expert 6 of layer 0"),
    ],
)
def test_placements_that_do_not_fit_the_model(routed: Model, placement: HybridPlacement, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        placement.checked_for(routed)


def test_seeds_of_residents_come_first_and_none_twice(routed: Model) -> None:
    both = frozenset({0, 1})
    placement = HybridPlacement(
        both, both, resident=frozenset({1}), expert_slots=8, seeds=((0, 3), (1, 2), (0, 3), (0, 1))
    )
    assert placement.checked_for(routed).seeds == (*((1, expert) for expert in range(6)), (0, 3), (0, 1))
    assert HybridPlacement.whole(routed).checked_for(routed).expert_slots == 12
    assert HybridPlacement().is_empty
    assert not HybridPlacement.whole(routed).is_empty


def test_tasks_move_the_stream_only_where_the_device_changes(dense: Model) -> None:
    placement = HybridPlacement(frozenset({0}), frozenset({0, 1}), output=False, ram_kv=frozenset({0}))
    tasks = [
        (task.work, task.device, None if task.layer is None else task.layer.index)
        for task in tasks_of(dense, placement)
    ]
    gpu, cpu = Device.GPU, Device.CPU
    assert tasks == [
        (Work.MOVE, gpu, None),
        (Work.SPLIT_ATTENTION, gpu, 0),
        (Work.FEED_FORWARD, gpu, 0),
        (Work.MOVE, cpu, None),
        (Work.ATTENTION, cpu, 1),
        (Work.MOVE, gpu, None),
        (Work.FEED_FORWARD, gpu, 1),
        (Work.MOVE, cpu, None),
        (Work.OUTPUT, cpu, None),
    ]


def test_whose_matrices_are_where(routed: Model) -> None:
    placement = HybridPlacement(frozenset({0}), frozenset({1}), output=True, resident=frozenset({1}), expert_slots=6)
    names = gpu_matrices(routed, placement)
    assert "blk.0.attn_q.weight" in names
    assert "blk.1.ffn_gate_inp.weight" in names
    assert "blk.1.ffn_up_shexp.weight" in names
    assert "output.weight" in names
    assert not any("_exps" in name or "norm" in name or "bias" in name for name in names)
    assert not any(name.startswith(("blk.1.attn", "blk.0.ffn")) for name in names)
    assert resident_matrices(routed, placement) == {f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")}


class Pool:
    """A pool on a simulated GPU."""

    def __init__(self, model: Model, tokens: int, limit_bytes: int | None = None) -> None:
        self.device = SimulatedDevice(FAST_GPU, limit_bytes=limit_bytes)
        layouts = KVPolicy().layouts(2, model.head_count_kv, model.key_length, model.value_length, BLOCK_TOKENS)
        self.stream = self.device.stream("test")
        self.pool = KVPool(self.device, self.stream, dict(enumerate(layouts)), tokens)
        self._model = model

    def kv(self, capacity: int = 1000) -> HybridKV:
        model = self._model
        return HybridKV(self.pool, 2, model.head_count_kv, model.key_length, model.value_length, capacity)


def test_blocks_grow_and_go_back(dense: Model) -> None:
    pool = Pool(dense, 2 * BLOCK_TOKENS)
    first, second = pool.kv(), pool.kv()
    first.prepare(0, BLOCK_TOKENS + 1)
    pool.pool.blocks(1).keys.numbers[first.blocks[1]].fill_(3.0)
    generation = pool.pool.generation
    second.prepare(0, 3 * BLOCK_TOKENS)
    assert pool.pool.generation > generation
    assert not set(first.blocks) & set(second.blocks)
    assert (pool.pool.blocks(1).keys.numbers[first.blocks[1]] == 3.0).all()
    held = pool.pool.num_bytes
    del second
    third = pool.kv()
    third.prepare(0, 3 * BLOCK_TOKENS)
    assert pool.pool.num_bytes == held
    third.length = 150
    third.truncate(BLOCK_TOKENS)
    assert len(third.blocks) == 1
    pool.device.close()


def test_growth_that_fails_leaves_blocks_as_they_were(dense: Model) -> None:
    layer_bytes = 4 * BLOCK_TOKENS * dense.head_count_kv * (dense.key_length + dense.value_length) * 2
    pool = Pool(dense, 4 * BLOCK_TOKENS, limit_bytes=4 * layer_bytes)
    kv = pool.kv()
    kv.prepare(0, 3 * BLOCK_TOKENS)
    for layer in (0, 1):
        pool.pool.blocks(layer).values.numbers[kv.blocks] = 2.0
    with pytest.raises(torch.OutOfMemoryError):
        kv.prepare(0, 40 * BLOCK_TOKENS)
    assert len(kv.blocks) == 3
    assert all((pool.pool.blocks(layer).values.numbers[kv.blocks] == 2.0).all() for layer in (0, 1))
    kv.prepare(0, 4 * BLOCK_TOKENS)
    pool.device.close()


@dataclass
class Held:
    """What a step's inputs read of a sequence."""

    blocks: list[int]
    ram_blocks: int = 0


def test_inputs_of_a_step_whose_first_tokens_lie_in_ram() -> None:
    device = SimulatedDevice(FAST_GPU)
    stream = device.stream("test")
    inputs, recording = StepInputs(device, StepShape(2, 2, 32, 100, 2048, is_apart=True)), Recording(stream)
    inputs.send(recording)
    inputs.fill([1100, 64], [Held([3, 7], 16), Held([9, 8])])
    recording.replay()
    stream.synchronize()
    assert inputs.positions.tolist() == [1100, 64]
    assert inputs.lanes.lengths.tolist() == [1101, 65]
    assert inputs.lanes.table[0, 16:18].tolist() == [3, 7]
    assert inputs.held.lengths.tolist() == [1101 - 1024, 65]
    assert inputs.held.table[:, :2].tolist() == [[3, 7], [9, 8]]
    device.close()


def test_inputs_of_a_step() -> None:
    device = SimulatedDevice(FAST_GPU)
    stream = device.stream("test")
    inputs, recording = StepInputs(device, StepShape(6, 2, 4, 100, 256)), Recording(stream)
    inputs.send(recording)
    for starts in ([5, 70], [6, 71]):
        inputs.fill(starts, [Held([3]), Held([9, 8])])
        recording.replay()
        stream.synchronize()
        assert inputs.positions.tolist() == [start + token for start in starts for token in range(3)]
        assert inputs.lanes.lengths.tolist() == [start + 3 for start in starts]
        assert inputs.lanes.table[1, :2].tolist() == [9, 8]
    device.close()


def test_blocks_of_tokens() -> None:
    assert [blocks_of(tokens) for tokens in (0, 1, 64, 65)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("quant_type", "tensor", "byte", "value"),
    [
        ("F32", "output.weight", 4 * 256 * 383, np.float32("-inf")),
        ("Q8_0", "blk.0.attn_q.weight", 34 * 9, np.float16("nan")),
        ("Q8_0", "blk.0.ffn_down_exps.weight", 34 * 8 * 256 * 3, np.float16("nan")),
    ],
)
def test_weights_on_the_gpu_that_are_no_numbers(
    quant_type: str, tensor: str, byte: int, value: np.generic, tmp_path: Path
) -> None:
    path = damaged(tmp_path / "model.gguf", quant_type, tensor, byte, value)
    with (
        pytest.raises(ModelFormatError, match=f"tensor {tensor} holds weights that are not finite"),
        hybrid(path, HybridPlacement.whole(model_of(path))),
    ):
        pass


def test_numbers_that_overflow_in_a_router_on_the_gpu_end_the_run(tmp_path: Path) -> None:
    """The host's program finds them; nothing is left waiting, and the cache is as it was."""
    spec = models.Spec("qwen3moe", blocks=1, qk_norm="head", experts=4, experts_used=1)
    path = models.write_model(tmp_path / "model.gguf", spec, "F32")
    placement = HybridPlacement(frozenset({0}), frozenset({0}), output=True, expert_slots=2)
    with hybrid(path, placement, threads=2) as runner:
        runner._gpu_weights.vector(runner.model.layers[0].ffn_norm).fill_(3e38)
        kv = runner.new_kv(64)
        with pytest.raises(ModelFormatError, match="infinite or undefined"):
            runner.forward([Step([1, 2, 3], kv)])
        assert kv.length == 0
        runner._gpu_weights.vector(runner.model.layers[0].ffn_norm).fill_(1.0)
        assert np.isfinite(runner.forward([Step([1, 2, 3], kv)])[0]).all()


def test_a_type_that_a_gpu_matrix_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.write_model(tmp_path / "model.gguf", models.spec_of("llama"), "F32")

    def refuse(*_args: object, **_options: object) -> None:
        raise NotImplementedError("F32 matrices on a GPU")

    monkeypatch.setattr("runtime.executor.hybrid.weights.GpuMatrix.allocate", refuse)
    with pytest.raises(UnsupportedModelError, match="cannot be the GPU's"), hybrid(path, HybridPlacement(output=True)):
        pass
