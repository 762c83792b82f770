"""Which GPU this machine offers to torch, found without importing torch where the system shows none.

Importing torch takes seconds, so the operating system is asked first. Knows nothing about models or budgets.
"""

import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GpuCapabilities:
    """One GPU as torch sees it. `compute_capability` is None for anything that is not CUDA or ROCm."""

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None
    torch_device: str  # "cuda:0", "mps", "xpu:0"


@dataclass(frozen=True, slots=True)
class NoGpu:
    """Why no GPU is used, and the step that may change it."""

    reason: str
    mend: str | None = None


def detect(*, root: Path = Path("/")) -> GpuCapabilities | None:
    """The first GPU that torch can use, None if there is none. `root` stands for "/" in tests."""
    if not _system_gpu(root) or _torch_is_cpu_only():
        return None
    import torch  # noqa: PLC0415  optional here: seconds to import, and only where a GPU may be

    if torch.cuda.is_available():
        free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        return GpuCapabilities(
            name=torch.cuda.get_device_name(0),
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            compute_capability=torch.cuda.get_device_capability(0),
            torch_device="cuda:0",
        )
    if torch.backends.mps.is_available():
        total_bytes = torch.mps.recommended_max_memory()
        free_bytes = max(total_bytes - torch.mps.driver_allocated_memory(), 0)
        return GpuCapabilities("Apple GPU", total_bytes, free_bytes, None, "mps")
    if torch.xpu.is_available():
        free_bytes, total_bytes = torch.xpu.mem_get_info(0)
        return GpuCapabilities(torch.xpu.get_device_name(0), total_bytes, free_bytes, None, "xpu:0")
    return None


def why_no_gpu(*, root: Path = Path("/")) -> NoGpu | None:
    """Why `detect` finds nothing; None where it finds a GPU."""
    system, torch_build = _system_gpu(root), f"torch {metadata.version('torch')}"
    if not system:
        return NoGpu("the system shows none")
    if _torch_is_cpu_only():
        return NoGpu(
            f"{system} is there, but {torch_build} is a build for the CPU alone",
            "install the torch build for this GPU: https://pytorch.org/get-started/locally",
        )
    if detect(root=root) is not None:
        return None
    return NoGpu(
        f"{system}{_driver_version(root)} is there, but {torch_build} cannot use it",
        "update the driver, or install a torch build for it: https://pytorch.org/get-started/locally",
    )


def _system_gpu(root: Path) -> str:
    """What of a GPU the operating system shows, in words; empty for nothing."""
    if sys.platform == "darwin":
        return "an Apple GPU"
    if (root / "proc/driver/nvidia").is_dir() or (root / "dev/nvidiactl").exists() or (root / "dev/dxg").exists():
        return "an NVIDIA driver" if not (root / "dev/dxg").exists() else "a GPU of the Windows host"
    if (root / "dev/kfd").exists():
        return "an AMD compute driver"
    if (root / "sys/module/xe").is_dir() and any((root / "dev/dri").glob("renderD*")):
        return "an Intel GPU driver"
    return ""


def _driver_version(root: Path) -> str:
    """Of NVIDIA's driver, after a space; empty where it does not say."""
    file = root / "proc/driver/nvidia/version"
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text(errors="replace")) if file.is_file() else None
    return f" {found[0]}" if found else ""


def _torch_is_cpu_only() -> bool:
    """Whether the installed wheel says by its version that it was built for the CPU alone."""
    return metadata.version("torch").partition("+")[2] == "cpu"
