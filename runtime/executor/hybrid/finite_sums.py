"""Which rows of a matrix on the GPU have no finite sum. Knows nothing about where a matrix comes from."""

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_kernels.device import GpuDevice, Stream
from gpu_kernels.kernels import Kernels
from gpu_kernels.matrix import GpuMatrix
from gpu_kernels.operations import Operations


class FiniteSums:
    """Multiplies matrices with ones: a sum is finite unless a weight is not, or it is too great."""

    def __init__(self, device: GpuDevice, stream: Stream, kernels: Kernels) -> None:
        self._device, self._stream, self._ops = device, stream, Operations(stream, kernels)

    def rows_without(self, matrix: GpuMatrix) -> NDArray[np.intp]:
        """Numbers of the rows whose sums are not finite; waits for the GPU. torch.OutOfMemoryError if it is full."""
        ones = self._device.empty((1, matrix.columns), torch.float32)
        sums = self._device.empty((1, matrix.rows), torch.float32)
        found = torch.empty(1, matrix.rows)
        self._stream.copy(ones, torch.ones(1, matrix.columns))
        self._ops.matmul(ones, matrix, sums)
        self._stream.copy(found, sums)
        self._stream.synchronize()
        return np.flatnonzero(~np.isfinite(found.numpy()[0]))
