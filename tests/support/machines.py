"""Machines of round figures, for planners that are asked about other machines than this one."""

from cpu_kernels.bandwidth import RatePoint
from cpu_kernels.quant_types import QUANT_TYPES
from planner.budget import GIB, Budget
from planner.machine import Cpu, Flash, FlashPoint, Gpu, KernelPoint, Machine


def cpu(threads: int = 4) -> Cpu:
    """40 GB/s and 100 GFLOP/s; each quant type read at RAM speed."""
    points = tuple(KernelPoint(count, columns, 40e9, 200e9) for count in {1, threads} for columns in (1, 128))
    return Cpu(
        name="a CPU",
        threads=threads,
        read=tuple(RatePoint(count, 10e9 + 30e9 * (count == threads)) for count in sorted({1, threads})),
        flops_per_s=100e9,
        operation_s=1e-6,
        kernels={kind.name: points for kind in QUANT_TYPES.values()},
    )


def gpu(memory_bytes: int = 8 * GIB) -> Gpu:
    """300 GB/s, on a link of 12 GB/s."""
    return Gpu("a GPU", memory_bytes, 300e9, 15e12, 5e-6, 12e9, 12e9, 20e-6)


def flash(bytes_per_s: float = 3e9) -> Flash:
    """A drive that reads large pieces at that rate, small ones at a tenth of it."""
    points = (FlashPoint(4096, 1, True, bytes_per_s / 10), FlashPoint(1 << 20, 8, True, bytes_per_s))
    return Flash("a drive", points, bytes_per_s, 500 * GIB)


def machine(
    *, ram_bytes: int = 16 * GIB, threads: int = 4, gpu_bytes: int | None = None, flash_rate: float | None = 3e9
) -> Machine:
    """A machine with those sizes; None is a part that is not there."""
    return Machine(
        name="a machine",
        source="test",
        cpu=cpu(threads),
        ram_bytes=ram_bytes,
        gpu=gpu(gpu_bytes) if gpu_bytes is not None else None,
        flash=flash(flash_rate) if flash_rate is not None else None,
    )


def budget_of(described: Machine) -> Budget:
    """All of its memory."""
    gpu_bytes = described.gpu.memory_bytes if described.gpu is not None else 0
    return Budget(described.ram_bytes, gpu_bytes, described.name, "a GPU" if described.gpu is not None else "no GPU")
