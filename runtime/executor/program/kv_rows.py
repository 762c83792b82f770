"""Blocks of a cache's rows as bytes: what its parts hold of a block, one part behind the other.

A part is (heads, bytes of a block): the keys or the values of a layer, as `cpu_kernels.kv_layout` lays them out,
whatever their type. Knows nothing about what the bytes mean.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def export_block(parts: Iterable[Bytes], out: Bytes) -> None:
    """Copies a block's parts to `out`, (bytes of the block,)."""
    for held, told in _pairs(parts, out):
        told[:] = held


def import_block(parts: Iterable[Bytes], data: Bytes) -> None:
    """Puts what `export_block` gave to where it belongs in the parts."""
    for held, told in _pairs(parts, data):
        held[:] = told


def _pairs(parts: Iterable[Bytes], data: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
    """Each part, and the same in `data`. ValueError if `data` is not as long as the parts say."""
    start = 0
    for held in parts:
        told = data[start : start + held.size]
        start += held.size
        if told.size < held.size:
            break
        yield held, told.reshape(held.shape)
    if start != data.size:
        raise ValueError(f"a block of {data.size} bytes, which is not what a cache's block has")
