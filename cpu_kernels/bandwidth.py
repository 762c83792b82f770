"""How fast this CPU reads and multiplies: a pure read of RAM, float32 matrix-vector and matrix-matrix products.

numpy alone, so that measuring costs no import of a compiler or of torch. Knows nothing about models or plans.

Why these calls, measured on two cores of an AMD EPYC (family 26, 32 MiB of last-level cache):
- `maximum.reduce` over uint32 has the fewest instructions a byte of numpy's reductions: with two threads it read a
  256 MiB array at 30 GB/s, a numba loop that sums it at 29 GB/s.
- `vecdot` runs BLAS's dot product row by row in the calling thread, so that the threads are ours: 27 GB/s from RAM and
  46 GB/s from cache beside other work, where a product by the library's own threads fell to 1 GB/s, waiting on itself.
- `matmul` over a stack of 64 x 64 matrices, likewise: 99 GFLOP/s with one thread, 187 with two, every time, where one
  product of 512 x 512 gave 221 or 11 GFLOP/s. torch reached 97 GFLOP/s with one thread.
Each figure is the best of several runs: the fastest is the one that other programs disturbed least.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MIN_BUFFER_BYTES = 128 << 20
MAX_BUFFER_BYTES = 1 << 30
_CACHES_PER_BUFFER = 3
_COLUMNS = 1024
_SQUARE = 64  # BLAS multiplies matrices of this size in the calling thread
_SQUARES = 128
_SMALL_ROWS = 32
_MIN_RUNS = 3


@dataclass(frozen=True, slots=True)
class RatePoint:
    """A rate measured at one size: threads for reads, bytes of the working set for products."""

    at: int
    bytes_per_s: float


def buffer_bytes(root: Path = Path("/")) -> int:
    """Bytes to measure RAM with: three times the last-level cache, 128 MiB at least. `root` stands for "/" in tests."""
    sizes = []
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        number, unit = text.rstrip("KMG"), text[-1:]
        sizes.append(int(number) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(unit, 1) if number.isdigit() else 0)
    return min(max(MIN_BUFFER_BYTES, _CACHES_PER_BUFFER * max(sizes, default=0)), MAX_BUFFER_BYTES)


def make_buffer(num_bytes: int) -> NDArray[np.float32]:
    """A float32 array of about `num_bytes` (4 MiB at least) whose pages are all in RAM, to measure with."""
    rows = max(num_bytes // (4 * _COLUMNS), _COLUMNS)
    return np.ones(rows * _COLUMNS, dtype=np.float32)


def read_rate(buffer: NDArray[np.float32], threads: int) -> float:
    """Bytes a second at which `threads` threads together read `buffer` once through."""
    parts = np.array_split(buffer.view(np.uint32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return buffer.nbytes / _best_seconds(lambda: list(pool.map(np.maximum.reduce, parts)))


def matvec_rate(buffer: NDArray[np.float32], working_set_bytes: int, threads: int) -> float:
    """Bytes of float32 matrices a second in matrix-vector products, going round `working_set_bytes` of rows.

    A small working set stays in the caches, as the weights of a small model do from token to token.
    """
    rows = max(threads, min(working_set_bytes, buffer.nbytes) // (4 * _COLUMNS))
    matrix = buffer[: rows * _COLUMNS].reshape(rows, _COLUMNS)
    vector = np.ones(_COLUMNS, dtype=np.float32)
    parts = np.array_split(matrix, threads)
    results = np.array_split(np.empty(rows, dtype=np.float32), threads)

    def multiply(part: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        np.vecdot(part, vector, out=result)

    with ThreadPoolExecutor(threads) as pool:
        return matrix.nbytes / _best_seconds(lambda: list(pool.map(multiply, parts, results)))


def matmul_flops(threads: int) -> float:
    """Operations a second (two a multiply-add) of float32 products of 64 x 64 matrices in `threads` threads."""
    matrices = np.ones((threads * _SQUARES, _SQUARE, _SQUARE), dtype=np.float32)
    parts = np.array_split(matrices, threads)
    results = np.array_split(np.empty_like(matrices), threads)

    def multiply(part: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        np.matmul(part, part, out=result)

    with ThreadPoolExecutor(threads) as pool:
        seconds = _best_seconds(lambda: list(pool.map(multiply, parts, results)), at_least_s=0.05)
    return 2 * _SQUARE**3 * len(matrices) / seconds


def small_operation_seconds() -> float:
    """Seconds of one numpy product so small (32 x 32) that only the cost of calling it is left."""
    matrix = np.ones((_SMALL_ROWS, _SMALL_ROWS), dtype=np.float32)
    vector = np.ones(_SMALL_ROWS, dtype=np.float32)
    calls = 1000
    return _best_seconds(lambda: [matrix @ vector for _ in range(calls)]) / calls


def conversion_rate(convert: Callable[[NDArray[np.uint8]], object], data: NDArray[np.uint8]) -> float:
    """Bytes of `data` a second that `convert` gets through, say a dequantizer."""
    return data.nbytes / _best_seconds(lambda: convert(data))


def _best_seconds(work: Callable[[], object], at_least_s: float = 0.02) -> float:
    """The shortest of at least 3 runs, and of as many as fit in `at_least_s`."""
    work()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < _MIN_RUNS or spent < at_least_s:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return max(best, 1e-9)
