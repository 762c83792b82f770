"""Matmul kernels on this machine: share of the read bandwidth at few columns, multiplications a second at many.

Weights of random bits go round a working set larger than the caches; every timed product is followed by a pure read of
as many bytes in the same run, and medians of the pairs are reported, as JSON lines with the spread of the ratio.

    python -m scripts.bench_kernels --types Q4_0,Q8_0 --columns 1,4,8,128 --rows 4096 --k 4096 --threads 1
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.activations import quantize_row
from cpu_kernels.compiler import kernel_address
from cpu_kernels.formats import PanelFormat, has_panel_format, panel_format
from cpu_kernels.isa import BY_NAME, current
from cpu_kernels.matmul import matmul_row
from cpu_kernels.memory import aligned_bytes
from cpu_kernels.pack import pack
from cpu_kernels.program import Row
from cpu_kernels.quant_types import QUANT_TYPES, QuantType, quant_type
from cpu_kernels.simd import MAX_ARGS, Kernel

WORKING_SET_BYTES = 320 << 20
_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
_READ_BYTES = 4096  # of one work item


def main() -> None:
    """Prints one JSON line for every type and number of columns."""
    arguments = _arguments()
    isa = BY_NAME[arguments.isa] if arguments.isa else current()
    names = arguments.types.split(",") if arguments.types else [t.name for t in QUANT_TYPES.values()]
    with ThreadPoolExecutor(arguments.threads) as pool:
        for weights in map(quant_type, names):
            if not has_panel_format(weights):
                continue
            form = panel_format(weights, isa)
            matrices, pack_s = _matrices(weights, form, arguments.rows, arguments.k)
            for n in map(int, arguments.columns.split(",")):
                result = _measure(form, matrices, arguments, n, pool)
                print(json.dumps({"pack_gb_per_s": round(pack_s, 2), **result}), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="")
    parser.add_argument("--columns", default="1,4,8,128")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--isa", default="")
    return parser.parse_args()


def _matrices(weights: QuantType, form: PanelFormat, rows: int, k: int) -> tuple[list[NDArray[np.uint8]], float]:
    """Enough packed matrices to exceed the caches, and the GB of GGUF bytes a second at which they were packed."""
    count = max(2, WORKING_SET_BYTES // form.panel_bytes(rows, k))
    data = np.random.default_rng(0).integers(0, 128, rows * weights.row_bytes(k), dtype=np.uint8)
    matrices = [aligned_bytes(form.panel_bytes(rows, k)) for _ in range(count)]
    rates = []
    for matrix in matrices:
        matrix[:] = 0
        start = time.perf_counter()
        pack(data, weights, rows, k, form.isa, out=matrix)
        rates.append(data.nbytes / (time.perf_counter() - start) / 1e9)
    return matrices, statistics.median(rates)


def _measure(
    form: PanelFormat,
    matrices: list[NDArray[np.uint8]],
    arguments: argparse.Namespace,
    n: int,
    pool: ThreadPoolExecutor,
) -> dict[str, Any]:
    rows, k = arguments.rows, arguments.k
    values = np.random.default_rng(1).standard_normal((n, k)).astype(np.float32)
    buffer = form.activations(k, n)
    out = np.empty((n, rows), dtype=np.float32)
    quantize = quantize_row(values.ctypes.data, 4 * k, n, buffer)
    quantize_s = min(_seconds(quantize, pool, 1) for _ in range(5))
    ours, reads = [], []
    for run in range(arguments.runs + 3):
        matrix = matrices[run % len(matrices)]
        row = matmul_row(form, matrix.ctypes.data, rows, k, buffer, out.ctypes.data, 4 * rows, n)
        ours.append(_seconds(row, pool, arguments.threads))
        other = matrices[(run + len(matrices) // 2) % len(matrices)]
        reads.append(_seconds(_read_row(form, other, out), pool, arguments.threads))
    ours, reads = ours[3:], reads[3:]
    ratios = sorted(read / mine for read, mine in zip(reads, ours, strict=True))
    seconds = statistics.median(ours)
    num_bytes = matrices[0].nbytes
    return {
        "isa": form.isa.name,
        "type": form.quant_type.name,
        "threads": arguments.threads,
        "n": n,
        "us": round(seconds * 1e6, 1),
        "gb_per_s": round(num_bytes / seconds / 1e9, 2),
        "read_gb_per_s": round(num_bytes / statistics.median(reads) / 1e9, 2),
        "share_of_read": round(statistics.median(ratios), 3),
        "share_p20_p80": [round(ratios[len(ratios) // 5], 3), round(ratios[len(ratios) * 4 // 5], 3)],
        "gmac_per_s": round(rows * k * n / seconds / 1e9, 1),
        "gmac_per_s_best": round(rows * k * n / min(ours) / 1e9, 1),
        "quantize_us": round(quantize_s * 1e6, 1),
    }


def _read_row(form: PanelFormat, matrix: NDArray[np.uint8], out: NDArray[np.float32]) -> Row:
    def trace(kernel: Kernel) -> None:
        parts = [kernel.variable(kernel.constant(kernel.ints, 0)) for _ in range(4)]
        with kernel.loop(kernel.begin * _READ_BYTES, kernel.end * _READ_BYTES, 64 * 4) as place:
            for index, part in enumerate(parts):
                address = kernel.arg(0) + place + 64 * index
                kernel.prefetch(address + 6144)
                for offset in range(0, 64, kernel.isa.vector_bytes):
                    part.set(part.get() ^ kernel.load(kernel.ints, address + offset))
        total = parts[0].get() ^ parts[1].get() ^ parts[2].get() ^ parts[3].get()
        kernel.store(kernel.sum_lanes(total), kernel.arg(1))

    address = kernel_address("bench_read", form.isa, trace)
    return Row("read", address, matrix.nbytes // _READ_BYTES, (matrix.ctypes.data, out.ctypes.data))


def _seconds(row: Row, pool: ThreadPoolExecutor, threads: int) -> float:
    assert isinstance(row.function, int)
    assert isinstance(row.items, int)
    args = np.zeros(MAX_ARGS, dtype=np.int64)
    for place, field in enumerate(row.args):
        assert isinstance(field, int)
        args[place] = field
    function: Callable[..., None] = _Function(row.function)
    bounds = [row.items * share // threads for share in range(threads + 1)]
    start = time.perf_counter()
    if threads == 1:
        function(args.ctypes.data, 0, row.items)
    else:
        list(pool.map(lambda share: function(args.ctypes.data, *bounds[share : share + 2]), range(threads)))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
