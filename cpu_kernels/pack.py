"""GGUF rows to panels, by kernels of the same builder as the products. Knows nothing about files or tensors."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.compiler import kernel_address
from cpu_kernels.formats import PanelFormat, panel_format
from cpu_kernels.isa import ISA
from cpu_kernels.memory import ALIGNMENT, aligned_bytes
from cpu_kernels.pack_lanes import LanePacker
from cpu_kernels.quant_types import QuantType
from cpu_kernels.simd import MAX_ARGS, Kernel
from cpu_kernels.tuning import Family

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def pack(
    data: NDArray[np.uint8],
    quant_type: QuantType,
    rows: int,
    columns: int,
    isa: ISA,
    out: NDArray[np.uint8] | None = None,
    threads: int = 1,
    family: Family = Family.DOT,
) -> NDArray[np.uint8]:
    """The bytes of a matrix as GGUF has them, row after row, to panels; new and aligned to 64 unless `out` is given.

    `rows` may be a run of a matrix's rows that starts on a row group, to pack piece by piece. ValueError if sizes do
    not match or `out` is not aligned, TypeError for other bytes than contiguous uint8, NotImplementedError for a type
    without kernels of that family. Runs without the interpreter lock.
    """
    form = panel_format(quant_type, isa, family)
    num_bytes = form.panel_bytes(rows, columns)
    _check_bytes(data, rows * quant_type.row_bytes(columns), "GGUF bytes")
    if out is None:
        out = aligned_bytes(num_bytes)
    _check_bytes(out, num_bytes, "panel bytes")
    if out.ctypes.data % ALIGNMENT:
        raise ValueError(f"panels must begin at a multiple of {ALIGNMENT} bytes")
    groups = form.groups(rows)
    args = np.zeros(MAX_ARGS, dtype=np.int64)
    table = form.layout.pack_table()
    args[:8] = (
        data.ctypes.data,
        quant_type.row_bytes(columns),
        form.steps(columns),
        rows,
        out.ctypes.data,
        form.group_bytes(columns),
        columns,
        0 if table is None else table.ctypes.data,
    )
    function = _Function(pack_address(form))
    shares = min(threads, groups)
    bounds = [groups * share // shares for share in range(shares + 1)]
    if shares == 1:
        function(args.ctypes.data, 0, groups)
    else:
        with ThreadPoolExecutor(shares) as pool:
            runs = [pool.submit(function, args.ctypes.data, *bounds[share : share + 2]) for share in range(shares)]
            for run in runs:
                run.result()
    return out


def pack_address(form: PanelFormat) -> int:
    """The kernel that packs row groups [begin, end).

    Arguments: 0 GGUF bytes, 1 bytes of a row, 2 steps, 3 rows, 4 panels, 5 bytes of a row group,
    6 columns, 7 the layout's table.
    """
    columns_a_step = form.layout.step_columns
    bytes_a_step = columns_a_step // form.quant_type.block_size * form.quant_type.block_bytes

    def trace(kernel: Kernel) -> None:
        source, row_bytes, steps, rows, target, group_bytes, columns = (kernel.arg(index) for index in range(7))
        with kernel.loop(kernel.begin, kernel.end) as group:
            first = group * kernel.lanes
            # Lanes past the last row repeat it: they are never stored.
            places = [kernel.minimum(first + lane, rows - 1) for lane in range(kernel.lanes)]
            starts = [source + place * row_bytes for place in places]
            packer = LanePacker(kernel, starts, target + group * group_bytes, columns)
            with kernel.loop(0, steps):
                form.layout.pack(packer)
                packer.next_step(columns_a_step, bytes_a_step)

    return kernel_address(f"pack_{form.name}", form.isa, trace, thorough=False)


def _check_bytes(data: NDArray[np.uint8], expected: int, what: str) -> None:
    if data.dtype != np.uint8 or not data.flags.c_contiguous:
        raise TypeError(f"{what} must be contiguous uint8, not {data.dtype}")
    if data.size < expected if what == "panel bytes" else data.size != expected:
        raise ValueError(f"{data.size} {what} where {expected} are needed")
