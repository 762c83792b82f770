"""Finding a GPU: the system is asked before torch is, and the reason for none is one a person can act on."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu_kernels import capabilities
from gpu_kernels.capabilities import GpuCapabilities, detect, why_no_gpu

no_mac = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac always shows its GPU")


@pytest.fixture
def nvidia(tmp_path: Path) -> Path:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    return tmp_path


def torch_with(cuda: bool = False, mps: bool = False, xpu: bool = False) -> SimpleNamespace:
    """As much of torch as is asked for, with the devices named."""
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: cuda,
            mem_get_info=lambda device: (5, 8),
            get_device_name=lambda device: "Card",
            get_device_capability=lambda device: (7, 5),
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        mps=SimpleNamespace(recommended_max_memory=lambda: 10, driver_allocated_memory=lambda: 4),
        xpu=SimpleNamespace(
            is_available=lambda: xpu, mem_get_info=lambda device: (1, 2), get_device_name=lambda device: "Arc"
        ),
    )


@no_mac
def test_no_gpu_without_importing_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from gpu_kernels.capabilities import detect, why_no_gpu;"
        "root = Path('/nowhere'); assert detect(root=root) is None;"
        "assert why_no_gpu(root=root).reason == 'the system shows none'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@no_mac
def test_a_cpu_build_of_torch_is_told_and_not_imported(nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities.metadata, "version", lambda name: "2.9.0+cpu")
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    assert detect(root=nvidia) is None
    why = why_no_gpu(root=nvidia)
    assert why is not None
    assert why.reason == "an NVIDIA driver is there, but torch 2.9.0+cpu is a build for the CPU alone"
    assert why.mend is not None
    assert "install" in why.mend


@no_mac
def test_a_driver_that_torch_cannot_use(nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities.metadata, "version", lambda name: "2.9.0")
    monkeypatch.setitem(sys.modules, "torch", torch_with())
    assert detect(root=nvidia) is None
    why = why_no_gpu(root=nvidia)
    assert why is not None
    assert why.reason == "an NVIDIA driver is there, but torch 2.9.0 cannot use it"
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n"
    (nvidia / "proc/driver/nvidia/version").write_text(version)
    why = why_no_gpu(root=nvidia)
    assert why is not None
    assert why.reason == "an NVIDIA driver 470.57.02 is there, but torch 2.9.0 cannot use it"


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ({"cuda": True}, GpuCapabilities("Card", 8, 5, (7, 5), "cuda:0")),
        ({"mps": True}, GpuCapabilities("Apple GPU", 10, 6, None, "mps")),
        ({"xpu": True}, GpuCapabilities("Arc", 2, 1, None, "xpu:0")),
    ],
)
def test_the_gpus_torch_knows(
    nvidia: Path, monkeypatch: pytest.MonkeyPatch, devices: dict[str, bool], expected: GpuCapabilities
) -> None:
    monkeypatch.setattr(capabilities.metadata, "version", lambda name: "2.9.0")
    monkeypatch.setitem(sys.modules, "torch", torch_with(**devices))
    assert detect(root=nvidia) == expected
    assert why_no_gpu(root=nvidia) is None


@no_mac
@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["dev/nvidiactl"], "NVIDIA"),
        (["dev/dxg"], "Windows"),
        (["dev/kfd"], "AMD"),
        (["sys/module/xe/version", "dev/dri/renderD128"], "Intel"),
    ],
)
def test_what_the_system_shows(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert words in capabilities._system_gpu(tmp_path)


def test_a_mac_shows_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities.sys, "platform", "darwin")
    assert capabilities._system_gpu(Path("/nowhere")) == "an Apple GPU"
