"""How a GPU is used here and why not in a better way: with whose kernels, and whether it can share steps with the CPU.

Knows nothing about models or plans. torch is imported on use: only machines with a GPU pay for it.
"""

from dataclasses import dataclass

from gpu_kernels.capabilities import GpuCapabilities
from gpu_kernels.host_calls import host_launcher

FIRST_WITHOUT_CUDA_12 = "2.15"  # of torch's wheels; those before that are built with CUDA 12.6 have Pascal and Volta
FIRST_OF_CUDA_13 = (7, 5)
MATRIX_UNITS_FROM = (8, 0)  # in Triton: before, its products are ordinary multiply-adds


@dataclass(frozen=True, slots=True)
class GpuPath:
    """`shares_steps`: a step may be divided between it and the CPU. `short`: what is missing; `mend`: how to get it."""

    kernels: str
    shares_steps: bool
    short: str | None = None
    mend: str | None = None

    @property
    def text(self) -> str:
        """In a line."""
        shared = "steps shared with the CPU" if self.shares_steps else "steps not shared with the CPU"
        return f"{self.kernels}, {shared}" + (f"; {self.short}" if self.short else "")


def gpu_path(gpu: GpuCapabilities) -> GpuPath:
    """Of a GPU that torch can use."""
    if not gpu.torch_device.startswith("cuda"):
        return GpuPath("torch's kernels", False, "sharing needs CUDA or ROCm")
    import torch  # noqa: PLC0415  optional here: seconds to import

    from gpu_kernels.dispatch import why_no_triton  # noqa: PLC0415  imports torch

    is_hip = torch.version.hip is not None
    built_for = torch.cuda.get_arch_list()
    capability = gpu.compute_capability or (0, 0)
    name = f"sm_{capability[0]}{capability[1]}"
    if not is_hip and built_for and not runs_on(built_for, capability):
        short = f"torch {torch.__version__} is built for {', '.join(built_for)}, not for {name}"
        return GpuPath("no kernels", False, short, _mend_build(capability))
    try:
        host_launcher(is_hip=is_hip)
    except NotImplementedError as error:
        return GpuPath("torch's kernels", False, str(error), "install or update the GPU's driver")
    reason = why_no_triton()
    if reason is not None:
        return GpuPath("torch's kernels", True, reason, "pip install 'triton>=3.5'")
    if not is_hip and capability < MATRIX_UNITS_FROM:
        short = f"without matrix units, which Triton uses from sm_80 on (this is {name})"
        return GpuPath("Triton kernels", True, short)
    return GpuPath("Triton kernels", True)


def runs_on(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of `sm_75`, `compute_90` and the like runs on a GPU (CUDA C++ guide, binary compatibility).

    Machine code runs on GPUs of the same major number and no lower minor one, PTX on all that are not older.
    """
    for target in built_for:
        kind, _, digits = target.partition("_")
        digits = digits.rstrip("af")  # sm_90a: with what only this GPU has
        if not digits.isdecimal():
            continue
        built = int(digits[:-1] or 0), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def _mend_build(capability: tuple[int, int]) -> str:
    if capability < FIRST_OF_CUDA_13:
        index = "https://download.pytorch.org/whl/cu126"
        return f"pip install 'torch<{FIRST_WITHOUT_CUDA_12}' --index-url {index}"
    return "pip install --upgrade torch"
