"""Pieces that the decoders of quantised blocks share: scales, bit fields, scaling of groups.

Knows nothing about single quant types. Everywhere `blocks` is uint8 of shape (n, block_bytes) and `out` is float32 of
shape (n, block_size), both contiguous; a decoder fills `out`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.uint8]
Weights = NDArray[np.float32]
Decoder = Callable[[Blocks, Weights], None]


def field(blocks: Blocks, start: int, dtype: str, count: int = 1) -> NDArray[Any]:
    """`count` little-endian numbers from byte `start` of every block, contiguous, shape (n, count)."""
    size = np.dtype(dtype).itemsize * count
    return np.ascontiguousarray(blocks[:, start : start + size]).view(dtype)


def half(blocks: Blocks, start: int) -> Weights:
    """The float16 at byte `start` of every block as float32, shape (n, 1)."""
    return field(blocks, start, "<f2").astype(np.float32)


def planes(packed: NDArray[np.uint8], shifts: Sequence[int], mask: int) -> NDArray[np.uint8]:
    """Bit fields of bytes, plane by plane: (n, runs, width) -> (n, runs, len(shifts), width)."""
    n, runs, width = packed.shape
    codes = np.empty((n, runs, len(shifts), width), dtype=np.uint8)
    for plane, shift in enumerate(shifts):
        np.right_shift(packed, shift, out=codes[:, :, plane])
    codes &= mask
    return codes


def scale_groups(out: Weights, scales: Weights, offsets: Weights | None = None) -> None:
    """out = out * scale (- offset), `scales` and `offsets` of shape (n, groups), each for an equal run of a block."""
    groups = out.reshape(*scales.shape, -1)
    groups *= scales[:, :, None]
    if offsets is not None:
        groups -= offsets[:, :, None]
