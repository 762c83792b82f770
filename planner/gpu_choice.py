"""Which GPU a plan may use: none, the one that is found, or a simulated one that is described; and how fast it is.

A simulated GPU is told from others by its device, which is its whole description: "sim:vram=4GiB,bw=192GB/s,...".
Knows nothing about models or plans.
"""

from gpu_kernels import capabilities
from gpu_kernels.capabilities import GpuCapabilities
from gpu_kernels.simulated_spec import SimulatedSpec
from offload.errors import RequestError
from planner.machine import Gpu
from planner.machine_here import HANDOVER_S, gpu_here
from planner.profile import Profile

OFF, FOUND = "off", "auto"
SIMULATED_PREFIX = "sim:"
EXAMPLE = "sim:vram=4GiB,bw=192GB/s,link=6GB/s,tflops=6"


def is_simulated(device: str) -> bool:
    """Whether `device`, as settings name it, is a simulated GPU."""
    return device.startswith(SIMULATED_PREFIX)


def chosen_gpu(text: str) -> GpuCapabilities | None:
    """The GPU that "off", "auto" or a description names, None for none; RequestError for anything else."""
    if text == OFF:
        return None
    if text == FOUND:
        return capabilities.detect()
    if not is_simulated(text):
        raise RequestError(f"there is no GPU {text!r}", hint=f"choose one of {OFF}, {FOUND} or {EXAMPLE}")
    spec = simulated_spec(text)
    return GpuCapabilities(
        name="simulated GPU",
        total_bytes=spec.vram_bytes,
        free_bytes=spec.vram_bytes,
        compute_capability=None,
        torch_device=spec.text,
    )


def gpu_text(device: str) -> str:
    """What to ask `chosen_gpu` for to have the device that settings name."""
    return device if is_simulated(device) else OFF if device == "cpu" else FOUND


def simulated_spec(text: str) -> SimulatedSpec:
    """What the description says; RequestError naming what is wrong with it."""
    try:
        return SimulatedSpec.parse(text)
    except ValueError as error:
        raise RequestError(f"the simulated GPU {text!r}: {error}", hint=f"describe it as in --gpu {EXAMPLE}") from error


def gpu_rates(gpu: GpuCapabilities, profile: Profile, memory_bytes: int) -> Gpu | None:
    """How fast `gpu` is, of which `memory_bytes` may be used; None where the profile has not measured it."""
    if is_simulated(gpu.torch_device):
        return _simulated(gpu, memory_bytes)
    return gpu_here(profile, memory_bytes) if profile.gpu is not None and profile.gpu.name == gpu.name else None


def _simulated(gpu: GpuCapabilities, memory_bytes: int) -> Gpu:
    """The figures of a description. To hand over is a copy, and the host's call behind it."""
    spec = simulated_spec(gpu.torch_device)
    return Gpu(
        name=gpu.name,
        memory_bytes=memory_bytes,
        read_bytes_per_s=spec.bytes_per_s,
        flops_per_s=spec.flops_per_s,
        launch_s=spec.launch_s,
        link_to_bytes_per_s=spec.link_bytes_per_s,
        link_from_bytes_per_s=spec.link_bytes_per_s,
        handover_s=spec.link_latency_s + HANDOVER_S,
    )
