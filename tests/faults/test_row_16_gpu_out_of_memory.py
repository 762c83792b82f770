"""Row 16: the GPU's memory does not suffice in the middle of a run. It goes on, with less on the GPU, and says so."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from gpu_kernels.simulated import SimulatedDevice
from gpu_kernels.torch_kernels import TorchKernels
from offload.errors import DeviceError
from offload.gguf import GGUFFile
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from tests.support import models, programs
from tests.support.divergence import max_kl_divergence
from tests.support.hybrid import FAST_GPU, all_logits, greedy, hybrid, model_of

IDS = models.prompt(length=200)
F16, Q8_0 = KVPolicy(), KVPolicy(KVType.Q8_0, KVType.Q8_0)
KL = {F16: 2e-6, Q8_0: 1e-4}  # what lies between two codes may become either


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("models") / "llama.gguf", models.spec_of("llama"), "F32")


@pytest.fixture(scope="module", params=[F16, Q8_0], ids=["f16", "q8_0"])
def policy(request: pytest.FixtureRequest) -> KVPolicy:
    """How keys and values are kept."""
    kept: KVPolicy = request.param
    return kept


@pytest.fixture(scope="module")
def expected(path: Path, policy: KVPolicy) -> np.ndarray:
    with programs.executor(path, kv_policy=policy) as runner:
        return all_logits(runner, IDS, 256)


def needed_bytes(path: Path, policy: KVPolicy, *, chunk_tokens: int, context_tokens: int) -> int:
    """Of the GPU's memory, for everything on it."""
    options = {"chunk_tokens": chunk_tokens, "context_tokens": context_tokens, "kv_policy": policy}
    with hybrid(path, HybridPlacement.whole(model_of(path)), **options) as runner:
        all_logits(runner, IDS, 256)
        return runner.gpu_bytes


def limited(path: Path, limit_bytes: int, context_tokens: int = 256, **options) -> HybridExecutor:
    file = GGUFFile.open(path)
    model = describe(file)
    device = SimulatedDevice(FAST_GPU, limit_bytes=limit_bytes)
    placement = HybridPlacement.whole(model)
    try:
        return HybridExecutor(model, file, placement, device, context_tokens=context_tokens, **options)
    finally:
        file.close()


def test_prompts_go_on_in_smaller_chunks(
    path: Path, policy: KVPolicy, expected: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    limit = needed_bytes(path, policy, chunk_tokens=64, context_tokens=256)
    runner = limited(path, limit, chunk_tokens=256, kv_policy=policy)
    with caplog.at_level(logging.WARNING, "strata.hybrid"):
        ours = all_logits(runner, IDS, 256)
    assert max_kl_divergence(expected, ours) < KL[policy]
    assert any("chunks of" in record.message for record in caplog.records)
    assert not runner.placement.ram_kv
    again = all_logits(runner, IDS, 256)
    np.testing.assert_allclose(again, ours, atol=1e-4)
    runner.close()


def test_keys_and_values_move_to_ram(
    path: Path, policy: KVPolicy, expected: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    limit = needed_bytes(path, policy, chunk_tokens=32, context_tokens=64) + (160 << 10)
    runner = limited(path, limit, context_tokens=64, chunk_tokens=32, kv_policy=policy)
    with caplog.at_level(logging.WARNING, "strata.hybrid"):
        kv, other = runner.new_kv(256), runner.new_kv(256)
        ours = [runner.forward([Step(IDS[start : start + 40], kv)], logits="all")[0] for start in range(0, 200, 40)]
        both = [runner.forward([Step(IDS[start : start + 40], other)], logits="all")[0] for start in range(0, 200, 40)]
    assert runner.placement.ram_kv
    assert any("move to RAM" in record.message for record in caplog.records)
    assert max_kl_divergence(expected, np.concatenate(ours)) < KL[policy]
    assert max_kl_divergence(expected, np.concatenate(both)) < KL[policy]
    runner.close()


def test_what_was_attended_before_is_still_there_after_a_move(path: Path, policy: KVPolicy) -> None:
    with programs.executor(path, kv_policy=policy) as plain:
        tokens, _ = greedy(plain, IDS[:50], 30)
    with hybrid(path, HybridPlacement.whole(model_of(path)), kv_policy=policy) as runner:
        kv = runner.new_kv(100)
        ours = [int(runner.forward([Step(IDS[:50], kv)])[0][-1].argmax())]
        while len(ours) < 30:
            if len(ours) in {10, 20}:
                runner._move_keys_and_values("as if")
            ours.append(int(runner.forward([Step(ours[-1:], kv)])[0][-1].argmax()))
        assert runner.placement.ram_kv == {0, 1}
    assert ours == tokens


class Failing:
    """Kernels one of whose products fails."""

    def __init__(self, at: int, error: Exception) -> None:
        self._kernels, self._left, self._error = TorchKernels(), at, error

    def matmul(self, *args: object, **options: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error
        self._kernels.matmul(*args, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._kernels, name)


@pytest.mark.parametrize("at", [14, 16, 19])
def test_a_kernel_that_finds_no_memory(path: Path, policy: KVPolicy, expected: np.ndarray, at: int) -> None:
    """Anywhere in a step, with the CPU's program waiting for the GPU or the other way round."""
    placement = HybridPlacement(frozenset({0, 1}), frozenset({0}), output=True)
    kernels = Failing(at, torch.OutOfMemoryError("CUDA out of memory"))
    with hybrid(path, placement, kernels=kernels, threads=2, kv_policy=policy) as runner:
        ours = all_logits(runner, IDS, 256)
        assert max_kl_divergence(expected, ours) < KL[policy]


@pytest.mark.parametrize("at", [14, 16, 19])
def test_a_device_that_fails_is_told_and_changes_nothing(
    path: Path, policy: KVPolicy, expected: np.ndarray, at: int
) -> None:
    placement = HybridPlacement(frozenset({0, 1}), frozenset({0}), output=True)
    kernels = Failing(at, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with hybrid(path, placement, kernels=kernels, threads=2, kv_policy=policy) as runner:
        kv = runner.new_kv(256)
        with pytest.raises(DeviceError, match="illegal memory access"):
            runner.forward([Step(IDS, kv)])
        assert kv.length == 0
        ours = runner.forward([Step(IDS, kv)], logits="all")[0]
        assert max_kl_divergence(expected, ours) < KL[policy]


def test_all_in_ram_and_still_too_little(path: Path) -> None:
    with hybrid(path, HybridPlacement.whole(model_of(path))) as runner:
        for _ in range(2):
            runner._move_keys_and_values("as if")
        with pytest.raises(DeviceError, match="does not suffice"):
            runner._move_keys_and_values("as if")
        assert len(all_logits(runner, IDS[:20])) == 20


def test_weights_that_do_not_fit(path: Path) -> None:
    with pytest.raises(DeviceError, match="does not fit"):
        limited(path, 1 << 20)


def test_a_reserve_that_does_not_fit_stays_in_ram(path: Path, policy: KVPolicy, expected: np.ndarray) -> None:
    room = {F16: 32 << 20, Q8_0: 17 << 20}[policy]
    limit = needed_bytes(path, policy, chunk_tokens=256, context_tokens=256) + room
    runner = limited(path, limit, context_tokens=1 << 16, kv_policy=policy)
    assert runner.placement.ram_kv == {1}
    assert max_kl_divergence(expected, all_logits(runner, IDS, 256)) < KL[policy]
    runner.close()
