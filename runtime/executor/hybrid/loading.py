"""Loads the weights of both devices, the host's first, and tells how far that is. Knows nothing about placements."""

from collections.abc import Callable

import torch

from offload.errors import DeviceError
from runtime.executor.hybrid.weights import GpuWeights
from runtime.panels import PanelWeights

Progress = Callable[[int, int], None]
"""(bytes of the file that are loaded, bytes there are to load)."""


def load_both(host: PanelWeights, gpu: GpuWeights, on_load: Progress | None) -> None:
    """Errors as `PanelWeights.load` and `GpuWeights.load`."""
    gpu_total, host_total = gpu.file_bytes, 0

    def host_progress(done: int, total: int) -> None:
        nonlocal host_total
        host_total = total
        if on_load is not None:
            on_load(done, total + gpu_total)

    host.load(host_progress)
    done = 0
    for num_bytes in gpu.load():
        done += num_bytes
        if on_load is not None:
            on_load(host_total + done, host_total + gpu_total)


def no_room(error: torch.OutOfMemoryError) -> DeviceError:
    """What is told where the GPU's memory does not hold its part."""
    return DeviceError(
        f"what the GPU is to hold does not fit in its memory: {error}",
        hint="plan with a smaller GPU budget, or run it with --gpu off",
    )
