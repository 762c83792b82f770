"""Which GPU a plan may use, and what a described one is like."""

from dataclasses import replace

import pytest

from gpu_kernels.bandwidth import GpuRates
from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import RequestError
from planner.budget import GIB
from planner.gpu_choice import EXAMPLE, chosen_gpu, gpu_rates, gpu_text, is_simulated
from tests.support.planning import profile

REAL = GpuCapabilities("a GPU", 8 * GIB, 7 * GIB, (8, 6), "cuda:0")


def test_off_is_none() -> None:
    assert chosen_gpu("off") is None


def test_auto_is_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.gpu_choice.capabilities.detect", lambda: REAL)
    assert chosen_gpu("auto") is REAL


def test_a_simulated_one_says_so() -> None:
    gpu = chosen_gpu(EXAMPLE)
    assert gpu is not None
    assert "simulated" in gpu.name
    assert (gpu.total_bytes, gpu.free_bytes, gpu.torch_device) == (4 * GIB, 4 * GIB, EXAMPLE)
    assert is_simulated(gpu.torch_device)
    rates = gpu_rates(gpu, profile(), 3 * GIB)
    assert rates is not None
    assert (rates.memory_bytes, rates.read_bytes_per_s, rates.flops_per_s) == (3 * GIB, 192e9, 6e12)
    assert rates.link_to_bytes_per_s == rates.link_from_bytes_per_s == 6e9


@pytest.mark.parametrize("text", ["on", "cuda:0", "sim:", "sim:vram=4GiB", "sim:vram=4GiB,bw=x,link=6GB/s,tflops=6"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        chosen_gpu(text)
    assert EXAMPLE in (caught.value.hint or "")


def test_rates_are_of_the_gpu_that_was_measured() -> None:
    measured = replace(profile(), gpu=GpuRates("a GPU", 2e11, 5e12, 5e-6))
    rates = gpu_rates(REAL, measured, GIB)
    assert rates is not None
    assert (rates.name, rates.memory_bytes, rates.read_bytes_per_s) == ("a GPU", GIB, 2e11)
    assert gpu_rates(REAL, profile(), GIB) is None
    assert gpu_rates(REAL, replace(measured, gpu=GpuRates("another", 1.0, 1.0, 1.0)), GIB) is None


def test_devices_are_asked_for_by_their_text() -> None:
    assert [gpu_text(device) for device in ("cpu", "cuda:0", EXAMPLE)] == ["off", "auto", EXAMPLE]
