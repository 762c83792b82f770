"""The activations of a step on the GPU, and those of the host that are copied from and to it.

Knows nothing of what they are for. Rows lie as far apart on both sides, so that a copy is one run of memory.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cpu_kernels.memory import ALIGNMENT
from gpu_kernels.device import GpuDevice
from runtime.executor.program.workspace import Workspace

SHARED = ("x", "normed", "delta", "qkv", "attended", "logits", "topk", "split")  # beginnings of names of what is copied


def pinned_workspace(device: GpuDevice) -> Workspace:
    """A workspace of the host whose memory is pinned where the GPU copies from or to it."""

    def allocate(name: str, num_bytes: int) -> NDArray[np.uint8]:
        is_shared = name.startswith(SHARED)
        size = (num_bytes + ALIGNMENT,)
        memory = device.pinned(size, torch.uint8) if is_shared else torch.zeros(size, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT
        array: NDArray[np.uint8] = memory.numpy()[start : start + num_bytes]
        return array

    return Workspace(allocate)


class GpuBuffers:
    """Named matrices of up to `capacity` rows; the same name, width and type always mean the same memory."""

    def __init__(self, device: GpuDevice, host: Workspace, capacity: int) -> None:
        self.capacity = self._host_capacity = capacity
        self._empty: Callable[..., torch.Tensor] = device.empty
        self._host = host
        self._tensors: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Of the GPU's memory."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())

    def matrix(
        self, name: str, rows: int, columns: int, *, most: int | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """(rows, columns), of at most `most` rows, by default the capacity. torch.OutOfMemoryError if full."""
        key = (name, columns, dtype)
        if key not in self._tensors:
            self._tensors[key] = self._empty((most or self.capacity, _stride(columns)), dtype)[:, :columns]
        return self._tensors[key][:rows]

    def vector(self, name: str, count: int, most: int, dtype: torch.dtype) -> torch.Tensor:
        """(count,), of at most `most`, side by side."""
        key = (name, most, dtype)
        if key not in self._tensors:
            self._tensors[key] = self._empty((most,), dtype)
        return self._tensors[key][:count]

    def shared(
        self, name: str, rows: int, columns: int, *, most: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a matrix here and of the host's of the same name, with what fills rows up: what `Stream.copy` takes.

        The host's has `most` rows, by default the capacity.
        """
        here = self.matrix(name, rows, columns, most=most)
        there = self._host.array(name, most or self._host_capacity, columns)
        stride = _stride(columns)
        assert there.strides[0] == 4 * stride or there.shape[0] == 1, "rows of the workspace lie as far apart as here"
        whole = torch.from_numpy(np.lib.stride_tricks.as_strided(there, (rows, stride), (4 * stride, 4)))
        return here.as_strided((rows, stride), (stride, 1)), whole

    def release(self, capacity: int) -> None:
        """Forgets all matrices, so that the memory is free when nothing uses it; new ones have that many rows."""
        self._tensors.clear()
        self.capacity = capacity


def _stride(columns: int) -> int:
    """Numbers from row to row in `Workspace.array`."""
    return -(-4 * columns // ALIGNMENT) * ALIGNMENT // 4
