"""This machine as the planner sees it, from its measured profile and what may be used of it.

Knows nothing about how a profile is measured.
"""

import shutil
from dataclasses import astuple, replace
from pathlib import Path

from offload.flash_probe import filesystem_key
from planner.budget import Budget
from planner.machine import Cpu, Flash, FlashPoint, Gpu, Machine
from planner.machine_files import with_kernels
from planner.profile import Profile

OPERATION_S = 1e-6  # a row of a program and its barrier, on two threads of an AMD EPYC (family 26)
# Of a GPU that has not been measured in these respects: PCIe 3.0 x16 at 80%, and 20 us to change devices.
LINK_BYTES_PER_S = 12.6e9
HANDOVER_S = 2e-5


def cpu_here(profile: Profile) -> Cpu:
    """The CPU of `profile`; kernels that were not measured are derived from its other rates."""
    cpu = Cpu(
        name=profile.cpu_name,
        threads=profile.threads,
        read=profile.read,
        flops_per_s=profile.matmul_flops_per_s,
        operation_s=OPERATION_S,
        kernels=profile.kernels,
        attention=profile.attention,
    )
    return replace(cpu, kernels={**with_kernels(cpu).kernels, **profile.kernels})


def gpu_here(profile: Profile, memory_bytes: int = 0) -> Gpu | None:
    """The GPU of `profile`, of which `memory_bytes` may be used."""
    rates = profile.gpu
    if rates is None:
        return None
    return Gpu(
        name=rates.name,
        memory_bytes=memory_bytes,
        read_bytes_per_s=rates.matvec_bytes_per_s,
        flops_per_s=rates.matmul_flops_per_s,
        launch_s=rates.op_overhead_s,
        link_to_bytes_per_s=rates.link_to_bytes_per_s or LINK_BYTES_PER_S,
        link_from_bytes_per_s=rates.link_from_bytes_per_s or LINK_BYTES_PER_S,
        handover_s=rates.handover_s or HANDOVER_S,
    )


def machine_here(profile: Profile, budget: Budget, model_path: Path | None = None) -> Machine:
    """The machine of `profile` within `budget`; without flash where the drive of `model_path` was not measured."""
    gpu = gpu_here(profile, budget.gpu_bytes)
    flash = None if model_path is None else flash_here(profile, model_path)
    return Machine(profile.cpu_name, "measured", cpu_here(profile), budget.ram_bytes, gpu, flash)


def flash_here(profile: Profile, path: Path) -> Flash | None:
    """The drive that a file lies on; None where it was not measured."""
    figures = profile.drives.get(filesystem_key(path))
    if figures is None:
        return None
    points = tuple(FlashPoint(*astuple(read)) for read in figures.reads)
    return Flash("the model's drive", points, figures.write_bytes_per_s, shutil.disk_usage(path.absolute().anchor).free)
