"""Row 16: every allocation of the GPU's memory in turn fails, once or from then on. Right answers or a typed error."""

import gc
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_kernels.simulated import SimulatedDevice
from offload.errors import DeviceError
from offload.gguf import GGUFFile
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from tests.support import models, programs
from tests.support.divergence import MAX_KL_OF_FLOATS, kl_divergences
from tests.support.failing_device import FailingDevice
from tests.support.hybrid import BRINGING, FAST_GPU, all_logits

IDS = models.prompt(length=44)
CHUNK = 40  # of the prompt; the rest comes token by token
BOTH = frozenset({0, 1})
SLOTS = HybridPlacement(BOTH, BOTH, output=True, expert_slots=8, seeds=((0, 1), (1, 2), (0, 3)), brought_slots=2)
OPTIONS = {"chunk_tokens": 64, "context_tokens": 32, "rates": BRINGING}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("models") / "mixtral.gguf", models.spec_of("mixtral"), "F32")


@pytest.fixture(scope="module")
def expected(path: Path) -> np.ndarray:
    return programs.logits_of(path, IDS)


def answers(runner: HybridExecutor) -> np.ndarray:
    """The logits of every position, in a call of many tokens and some of one."""
    kv = runner.new_kv(64)
    rows = [runner.forward([Step(IDS[:CHUNK], kv)], logits="all")[0]]
    rows += [runner.forward([Step([token], kv)])[0] for token in IDS[CHUNK:]]
    return np.concatenate(rows)


def attempt(path: Path, device: SimulatedDevice) -> np.ndarray | None:
    """What a run gives; None where it was refused."""
    with GGUFFile.open(path) as file:
        try:
            runner = HybridExecutor(describe(file), file, SLOTS, device, **OPTIONS)
        except DeviceError:
            return None
        try:
            return answers(runner)
        except DeviceError:
            return None
        finally:
            runner.close()


def check_nothing_leaks(device: SimulatedDevice) -> None:
    gc.collect()
    assert device.free_bytes == device.total_bytes


def test_once(path: Path, expected: np.ndarray) -> None:
    """Those of a run each, those of loading, which are alike, one of seven."""
    with GGUFFile.open(path) as file:
        device = FailingDevice(FAST_GPU, 1 << 30)
        HybridExecutor(describe(file), file, SLOTS, device, **OPTIONS).close()
    loading, at, refused = device.asked, 1, 0
    while True:
        device = FailingDevice(FAST_GPU, at)
        ours = attempt(path, device)
        check_nothing_leaks(device)
        if ours is None:
            assert at <= loading
            refused += 1
        else:
            assert kl_divergences(expected, ours).max() <= MAX_KL_OF_FLOATS
        if not device.has_failed:
            break
        at += 7 if at < loading - 7 else 1
    assert refused
    assert at > loading + 5


def test_from_then_on(path: Path, expected: np.ndarray) -> None:
    for at in range(1, 1000, 7):
        device = FailingDevice(FAST_GPU, at, lasts=True)
        ours = attempt(path, device)
        check_nothing_leaks(device)
        if ours is not None:
            assert kl_divergences(expected, ours).max() <= MAX_KL_OF_FLOATS
        if not device.has_failed:
            break
    assert ours is not None


def test_slots_give_way_before_keys_and_values(
    path: Path, expected: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with GGUFFile.open(path) as file, caplog.at_level(logging.WARNING, "strata.hybrid"):
        device = SimulatedDevice(FAST_GPU)
        runner = HybridExecutor(describe(file), file, SLOTS, device, **{**OPTIONS, "chunk_tokens": 32})
        assert kl_divergences(expected, answers(runner)).max() <= MAX_KL_OF_FLOATS
        taken = device.empty((device.free_bytes - 4096,), torch.uint8)  # by somebody else
        ours = all_logits(runner, 4 * IDS, 256)
        assert kl_divergences(programs.logits_of(path, 4 * IDS, capacity_tokens=256), ours).max() <= MAX_KL_OF_FLOATS
        assert 0 < runner.placement.expert_slots < SLOTS.expert_slots
        assert not runner.placement.ram_kv
        assert any("slots for experts are given up" in record.message for record in caplog.records)
        assert taken.numel()
        runner.close()
