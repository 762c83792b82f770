"""Aligned memory as numpy arrays. Knows nothing about what is put there."""

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


def aligned_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes that begin on a cache line; pages are taken from the system when they are first written."""
    memory = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes]
