"""Blocks of a cache's rows as bytes: what its parts hold of a block, one part behind the other.

A part is (pieces, heads, blocks of a piece, bytes of a block), as `cpu_kernels.kv_layout` lays keys or values out,
whatever their type. Knows nothing about what the bytes mean.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def export_block(parts: Iterable[Bytes], index: int, out: Bytes) -> None:
    """Copies what the parts hold of a block to `out`, (bytes of the block,)."""
    for held, told in _pairs(parts, index, out):
        told[:] = held


def import_block(parts: Iterable[Bytes], index: int, data: Bytes) -> None:
    """Puts what `export_block` gave to where it belongs in the parts."""
    for held, told in _pairs(parts, index, data):
        held[:] = told


def _pairs(parts: Iterable[Bytes], index: int, data: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
    """A block in each part and in `data`: (heads, bytes) each. ValueError if `data` is not as long as the parts say."""
    start = 0
    for part in parts:
        piece, block = divmod(index, part.shape[2])
        held = part[piece, :, block]
        told = data[start : start + held.size]
        start += held.size
        if told.size < held.size:
            break
        yield held, told.reshape(held.shape)
    if start != data.size:
        raise ValueError(f"a block of {data.size} bytes, which is not what a cache's block has")
