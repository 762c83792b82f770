"""The memory that a step's operations pass on to each other, shared by all layers and programs of an executor.

Knows nothing of what it is for. Pages are taken from the system when they are first written.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.activations import ActivationBuffer, ActivationKind
from cpu_kernels.formats import PanelFormat
from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix
from cpu_kernels.memory import ALIGNMENT, aligned_bytes

Allocate = Callable[[str, int], NDArray[np.uint8]]
"""(name of what it is for, bytes): zeroed memory that begins on a cache line."""


class Workspace:
    """Named matrices and activation buffers; the same name and shape always mean the same memory."""

    def __init__(self, allocate: Allocate | None = None) -> None:
        """`allocate` gives the memory of matrices and integers; None: ordinary memory."""
        self._allocate = allocate or (lambda _, num_bytes: aligned_bytes(num_bytes))
        self._arrays: dict[tuple[str, int, int], NDArray[np.float32]] = {}
        self._integers: dict[tuple[str, int], NDArray[np.int32]] = {}
        self._buffers: dict[tuple[ActivationKind, ISA, int, int], ActivationBuffer] = {}

    def array(self, name: str, rows: int, columns: int) -> NDArray[np.float32]:
        """(rows, columns) float32, every row on a cache line."""
        key = (name, rows, columns)
        if key not in self._arrays:
            stride = -(-4 * columns // ALIGNMENT) * ALIGNMENT // 4
            self._arrays[key] = (
                self._allocate(name, 4 * rows * stride).view(np.float32).reshape(rows, stride)[:, :columns]
            )
        return self._arrays[key]

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """The same as a kernel's operand."""
        return Matrix.of(self.array(name, rows, columns))

    def integer_array(self, name: str, count: int) -> NDArray[np.int32]:
        """`count` int32."""
        if (name, count) not in self._integers:
            self._integers[name, count] = self._allocate(name, 4 * count).view(np.int32)
        return self._integers[name, count]

    def integers(self, name: str, count: int) -> int:
        """The address of `count` int32."""
        return int(self.integer_array(name, count).ctypes.data)

    def activations(self, form: PanelFormat, k: int, capacity: int) -> ActivationBuffer:
        """What a product with a format's panels reads; formats that read the same share it."""
        key = (form.activation_kind, form.isa, k, capacity)
        if key not in self._buffers:
            self._buffers[key] = ActivationBuffer.allocate(form.activation_kind, k, capacity, form.isa)
        return self._buffers[key]
