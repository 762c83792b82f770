"""How a GPU is used, and what is said where it could be used better."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_kernels import gpu_path as module
from gpu_kernels.capabilities import GpuCapabilities
from gpu_kernels.gpu_path import GpuPath, gpu_path, runs_on

NEW_WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
OLD_WHEEL = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


def card(capability: tuple[int, int] | None, torch_device: str = "cuda:0") -> GpuCapabilities:
    """A GPU of this generation."""
    return GpuCapabilities("Card", 8 << 30, 7 << 30, capability, torch_device)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine on which everything is there, for tests to break."""
    state = SimpleNamespace(built_for=NEW_WHEEL, hip=None, driver=None, triton=None)

    def launcher(*, is_hip: bool) -> None:
        if state.driver is not None:
            raise NotImplementedError(state.driver)

    torch: Any = SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(hip=state.hip),
        cuda=SimpleNamespace(get_arch_list=lambda: state.built_for),
    )
    state.torch = torch
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(module, "host_launcher", launcher)
    monkeypatch.setitem(sys.modules, "gpu_kernels.dispatch", SimpleNamespace(why_no_triton=lambda: state.triton))
    return state


def test_the_best(machine: SimpleNamespace) -> None:
    path = gpu_path(card((8, 9)))
    assert path == GpuPath("Triton kernels", True)
    assert path.text == "Triton kernels, steps shared with the CPU"


def test_an_old_gpu_and_a_new_torch(machine: SimpleNamespace) -> None:
    path = gpu_path(card((6, 1)))
    assert not path.shares_steps
    assert path.text.startswith("no kernels, steps not shared with the CPU; torch 2.13.0 is built for sm_75, ")
    assert path.text.endswith("not for sm_61")
    assert path.mend == "pip install 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"
    machine.built_for = OLD_WHEEL
    path = gpu_path(card((6, 1)))
    assert path.shares_steps
    assert path.mend is None
    assert "without matrix units" in path.text


def test_a_new_gpu_and_an_old_torch(machine: SimpleNamespace) -> None:
    machine.built_for = OLD_WHEEL
    assert gpu_path(card((12, 0))).mend == "pip install --upgrade torch"


def test_no_triton(machine: SimpleNamespace) -> None:
    machine.triton = "Triton is not installed"
    path = gpu_path(card((8, 6)))
    assert path == GpuPath("torch's kernels", True, "Triton is not installed", "pip install 'triton>=3.5'")


def test_no_driver_library(machine: SimpleNamespace) -> None:
    machine.driver = "host functions on a stream need cuLaunchHostFunc of libcuda.so.1: not found"
    path = gpu_path(card((8, 6)))
    assert path.text == f"torch's kernels, steps not shared with the CPU; {machine.driver}"
    assert path.mend is not None


def test_amd(machine: SimpleNamespace) -> None:
    machine.torch.version.hip = "6.4"
    machine.built_for = ["gfx1100"]
    assert gpu_path(card((11, 0))) == GpuPath("Triton kernels", True)


def test_other_devices(machine: SimpleNamespace) -> None:
    path = gpu_path(card(None, "mps"))
    assert path.text == "torch's kernels, steps not shared with the CPU; sharing needs CUDA or ROCm"
    assert path.mend is None


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 9), ["sm_86"], True),
        ((8, 6), ["sm_89"], False),
        ((9, 0), ["sm_86"], False),
        ((9, 0), ["sm_86", "compute_86"], True),
        ((9, 0), ["sm_90a"], True),
        ((6, 1), ["sm_60"], True),
        ((12, 0), ["sm_100", "compute_120"], True),
        ((10, 0), ["sm_100"], True),
        ((7, 5), ["gfx906"], False),
    ],
)
def test_which_code_runs(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert runs_on(built_for, capability) == runs
