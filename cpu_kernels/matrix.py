"""Where a matrix of float32 activations lies. Knows nothing else; the memory is the caller's."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.program import Parameter


@dataclass(frozen=True, slots=True)
class Matrix:
    """(tokens, columns) float32 at `address`, rows `stride` numbers apart. The number of tokens is the operation's."""

    address: int
    columns: int
    stride: int

    def __post_init__(self) -> None:
        if self.columns < 1 or self.stride < self.columns:
            raise ValueError(f"a matrix of {self.columns} columns, rows {self.stride} apart")

    @classmethod
    def of(cls, array: NDArray[np.float32]) -> "Matrix":
        """A two-dimensional array, which must outlive what is done with the matrix; TypeError for another type."""
        if array.dtype != np.float32 or array.ndim != 2 or array.strides[1] != 4:
            raise TypeError(f"float32 rows wanted, got {array.dtype} {array.shape} with strides {array.strides}")
        rows, columns = array.shape
        return cls(array.ctypes.data, columns, columns if rows == 1 else array.strides[0] // 4)

    def slice(self, start: int, columns: int) -> "Matrix":
        """Some of the columns; ValueError for columns that are not there."""
        if start < 0 or start + columns > self.columns:
            raise ValueError(f"columns {start} to {start + columns} of {self.columns}")
        return Matrix(self.address + 4 * start, columns, self.stride)

    def rows_from(self, token: int) -> "Matrix":
        """The rows from `token` on."""
        return Matrix(self.address + 4 * self.stride * token, self.columns, self.stride)

    @property
    def stride_bytes(self) -> int:
        """Bytes from row to row."""
        return 4 * self.stride


@dataclass(frozen=True, slots=True)
class LaterMatrix:
    """A `Matrix` whose address is told before each run."""

    address: Parameter
    columns: int
    stride: int

    def slice(self, start: int, columns: int) -> "LaterMatrix":
        """Some of the columns; ValueError for columns that are not there."""
        if start < 0 or start + columns > self.columns:
            raise ValueError(f"columns {start} to {start + columns} of {self.columns}")
        return LaterMatrix(replace(self.address, offset=self.address.offset + 4 * start), columns, self.stride)

    @property
    def stride_bytes(self) -> int:
        """Bytes from row to row."""
        return 4 * self.stride


AnyMatrix = Matrix | LaterMatrix


def require_columns(name: str, wanted: int, *matrices: Matrix) -> None:
    """ValueError unless all have `wanted` columns."""
    for matrix in matrices:
        if matrix.columns != wanted:
            raise ValueError(f"{name}: {matrix.columns} columns where there should be {wanted}")
