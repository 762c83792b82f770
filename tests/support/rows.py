"""Runs rows of a program on arrays, and tells whether the result is close enough."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpu_kernels.isa import runnable_isas
from cpu_kernels.pool import Pool
from cpu_kernels.program import Program, Row

ISAS = runnable_isas()
ISA_NAMES = [isa.name for isa in ISAS]
THREADS = (1, 2, 3)
TOLERANCE = 4e-6  # of the greatest number: float32 sums of some thousand terms


def address(array: NDArray[np.generic]) -> int:
    """Of an array's first byte; the array must outlive what uses it."""
    return int(array.ctypes.data)


def floats(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    """Normal numbers, the same for the same seed and shape."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def close(found: ArrayLike, wanted: ArrayLike, tolerance: float = TOLERANCE) -> bool:
    """Whether no number is off by more than `tolerance` of the greatest wanted one."""
    reference = np.asarray(wanted, np.float64)
    return bool(np.abs(np.asarray(found, np.float64) - reference).max() <= tolerance * np.abs(reference).max())


def run(*rows: Row, threads: int = 1) -> None:
    """Runs the rows once."""
    with Pool(threads) as pool:
        pool.run(Program(rows))
