"""Single rows of a matrix in panels as float32, and a check that a panel holds only finite numbers.

Both run kernels of the panel's format outside of a program, such that every format can be read back without code of its
own. Knows nothing about tensors or what a row is for.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.activations import ActivationBuffer, ActivationKind, quantize_row
from cpu_kernels.compiler import kernel_address
from cpu_kernels.dot_rows import trace_row
from cpu_kernels.formats import PanelFormat
from cpu_kernels.matmul import matmul_row
from cpu_kernels.program import FIRST_ARGUMENT, Program, Row

_TABLE_UNIT = 127.0  # its tables have the scale 1/2, so that products are exact
_Operation = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class PanelRows:
    """Reads rows of the matrix (rows, columns) in panels at an address, which must outlive this. One thread at a time.

    A value differs from the reference decoder's by at most 3 units in the last place.
    """

    def __init__(self, form: PanelFormat, panels: int, rows: int, columns: int) -> None:
        self._form = form
        self._panels = panels
        self._rows = rows
        self._columns = columns
        is_integer = form.activation_kind is ActivationKind.INT8
        self._source = _KernelRows(form, columns) if is_integer else _ProductRows(form, panels, columns)

    def read(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(len(ids), columns); IndexError for a row that is not there."""
        result = np.empty((len(ids), self._columns), np.float32)
        group_bytes = self._form.group_bytes(self._columns)
        for place, row in enumerate(ids):
            if not 0 <= row < self._rows:
                raise IndexError(f"row {row} of {self._rows}")
            group, lane = divmod(row, self._form.group_rows)
            result[place] = self._source.read(self._panels + group * group_bytes, lane)[: self._columns]
        return result


class _KernelRows:
    """Rows by the kernel of `trace_row`: 2048 Q6_K weights in 4.7 us, by products in 37 (Zen 5)."""

    def __init__(self, form: PanelFormat, columns: int) -> None:
        steps = form.steps(columns)
        self._out = np.zeros(steps * form.layout.step_columns, np.float32)
        address = kernel_address(
            f"row_{form.name}", form.isa, lambda kernel: trace_row(kernel, form.layout), thorough=False
        )
        self._call = _Call(Row("row", address, 1, (0, steps, 0, self._out.ctypes.data), keep=(self._out,)))

    def read(self, group: int, lane: int) -> NDArray[np.float32]:
        """A row of the group at an address, valid until the next."""
        self._call.run({0: group, 2: lane})
        return self._out


class _ProductRows:
    """Rows by a product with unit columns, for formats that are multiplied in other ways than as integers."""

    def __init__(self, form: PanelFormat, panels: int, columns: int) -> None:
        width = form.layout.step_columns
        steps = form.steps(columns)
        self._unit = np.float32(1.0 if form.activation_kind is ActivationKind.FLOAT32 else _TABLE_UNIT)
        units = filled_activations(form, np.eye(width, dtype=np.float32) * self._unit)
        self._out = np.zeros((width, steps, form.group_rows), np.float32)
        # every step of one row group becomes a row group of its own, of one step
        row = matmul_row(form, panels, steps * form.group_rows, width, units, self._out.ctypes.data, 0, width)
        self._call = _Call(row, {1: form.group_bytes(columns) // steps, 7: self._out.strides[0]})

    def read(self, group: int, lane: int) -> NDArray[np.float32]:
        """A row of the group at an address."""
        self._call.run({0: group})
        return self._out[:, :, lane].T.reshape(-1) / self._unit


class PanelSums:
    """Sums of a format's rows of `columns` weights: not finite where a weight is not."""

    def __init__(self, form: PanelFormat, columns: int) -> None:
        self._form = form
        self._columns = columns
        self._ones = filled_activations(form, np.ones((1, columns), np.float32))

    def of(self, panels: int, rows: int) -> NDArray[np.float32]:
        """(rows,) of a matrix in panels at an address."""
        out = np.empty(rows, np.float32)
        row = matmul_row(self._form, panels, rows, self._columns, self._ones, out.ctypes.data, out.nbytes, 1)
        _Call(row).run()
        return out


def filled_activations(form: PanelFormat, values: NDArray[np.float32]) -> ActivationBuffer:
    """Activations for a format from float32 (n, k)."""
    buffer = ActivationBuffer.allocate(form.activation_kind, values.shape[1], len(values), form.isa)
    _Call(quantize_row(values.ctypes.data, values.strides[0], len(values), buffer)).run()
    return buffer


class _Call:
    """One operation, called from Python with some of its arguments changed."""

    def __init__(self, row: Row, changes: dict[int, int] | None = None) -> None:
        program = Program([row])
        for argument, value in (changes or {}).items():
            program.patch(0, argument, value)
        self._program = program  # it holds what the arguments point to
        self._table = program.table()[0]
        self._function = _Operation(int(self._table[0]))
        self._arguments = self._table.ctypes.data + FIRST_ARGUMENT * self._table.itemsize

    def run(self, changes: dict[int, int] | None = None) -> None:
        """Runs all items on this thread, without the interpreter lock."""
        for argument, value in (changes or {}).items():
            self._table[FIRST_ARGUMENT + argument] = value
        self._function(self._arguments, 0, int(self._table[1]))
