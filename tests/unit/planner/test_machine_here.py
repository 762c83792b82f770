"""This machine from its profile."""

from dataclasses import replace
from pathlib import Path

from gpu_kernels.bandwidth import GpuRates
from offload.flash_probe import DriveFigures, ReadFigure, filesystem_key
from planner.budget import Budget
from planner.machine import KernelPoint
from planner.machine_here import cpu_here, gpu_here, machine_here
from tests.support.planning import profile

BUDGET = Budget(8 << 30, 2 << 30, "free memory", "none")


def test_measured_kernels_stay_and_others_are_derived() -> None:
    point = KernelPoint(1, 1, 1e9, 2e9)
    cpu = cpu_here(replace(profile(), kernels={"Q8_0": (point,)}))
    assert point in cpu.kernels["Q8_0"]
    assert cpu.kernels["Q4_0"]


def test_the_drive_of_the_model(tmp_path: Path) -> None:
    measured = profile()
    assert machine_here(measured, BUDGET, tmp_path).flash is None
    drives = {filesystem_key(tmp_path): DriveFigures((ReadFigure(1 << 20, 4, True, 2e9),), 1e9)}
    flash = machine_here(replace(measured, drives=drives), BUDGET, tmp_path / "model.gguf").flash
    assert flash is not None
    assert flash.best().bytes_per_s == 2e9


def test_the_gpu_of_the_profile() -> None:
    assert gpu_here(profile()) is None
    gpu = machine_here(replace(profile(), gpu=GpuRates("one", 1e11, 1e13, 5e-6)), BUDGET).gpu
    assert gpu is not None
    assert (gpu.memory_bytes, gpu.read_bytes_per_s) == (2 << 30, 1e11)
