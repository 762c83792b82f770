"""Blocks of a cache's rows as bytes: what its parts hold of a block, one part behind the other; and which have come.

A part is (heads, bytes of a block): the keys or the values of a layer, as `cpu_kernels.kv_layout` lays them out,
whatever their type. Knows nothing about what the bytes mean.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_layout import BLOCK_TOKENS, KVLayout
from cpu_kernels.kv_policy import KVPolicy
from runtime.executor.saved_rows import RowsLayout

Bytes = NDArray[np.uint8]


class Arrivals:
    """Blocks of one sequence that come in any order, from several threads."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.first = 0  # that is not there
        self._others: set[int] = set()

    def add(self, index: int, first: int) -> None:
        """A block is there; those before `first` were."""
        with self.lock:
            self.first = max(self.first, first)
            self._others.add(index)
            while self.first in self._others:
                self._others.remove(self.first)
                self.first += 1


def rows_layout(policy: KVPolicy, layers: Sequence[KVLayout]) -> RowsLayout:
    """That of blocks of layers which are kept by a policy: one layer behind the other, keys, then values."""
    turned = any(layer.rotates_keys or layer.rotates_values for layer in layers)
    types = "f16" if policy.is_plain else f"{policy.name}, in pairs{', turned' if turned else ''}"
    name = (
        f"{types}, {len(layers)} layers of {layers[0].kv_heads} heads, keys of {layers[0].key_length}, "
        f"values of {layers[0].value_length}, in blocks of {BLOCK_TOKENS}"
    )
    return RowsLayout(name, BLOCK_TOKENS, sum(layer.block_bytes for layer in layers))


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
