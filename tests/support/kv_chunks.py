"""Chunks of keys and values that lie in memory in no order."""

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_layout import KVLayout
from cpu_kernels.memory import aligned_bytes


def scattered_chunks(layout: KVLayout, fill: np.generic) -> list[NDArray[np.uint8]]:
    """Those of all pieces of a layout, filled with a number; a piece's lies before that of the one before it."""
    memory = aligned_bytes(layout.pieces * layout.chunk_bytes)
    memory.view(fill.dtype)[:] = fill
    return list(memory.reshape(layout.pieces, -1)[::-1])
