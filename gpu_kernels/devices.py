"""Opens a GPU by its name: `cuda:0`, or the text of a simulated one."""

from gpu_kernels.cuda_device import CudaDevice
from gpu_kernels.device import GpuDevice
from gpu_kernels.simulated import SimulatedDevice
from gpu_kernels.simulated_spec import PREFIX


def open_device(name: str, *, limit_bytes: int | None = None) -> GpuDevice:
    """A device as torch names it, or `sim:...`; `limit_bytes` of its memory are used at most.

    ValueError for a name that is none, NotImplementedError for a device that has no streams or is not usable here.
    """
    if name.startswith(PREFIX):
        return SimulatedDevice(name, limit_bytes=limit_bytes)
    kind, _, index = name.partition(":")
    if kind != "cuda":
        raise NotImplementedError(f"{name}: only CUDA and ROCm GPUs, and simulated ones, can share a step with the CPU")
    if not (index.isdecimal() or not index):
        raise ValueError(f"{name!r} is no GPU: cuda:0 is the first one")
    return CudaDevice(int(index or 0), limit_bytes=limit_bytes)
