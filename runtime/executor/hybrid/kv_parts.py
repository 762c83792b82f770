"""What a step needs to know of the lanes whose first tokens lie in RAM, for layers of the GPU too.

Knows nothing about how such tokens come there.
"""

from collections.abc import Iterable, Sequence
from typing import cast

from runtime.architectures.base import Model
from runtime.executor.hybrid.kv import HybridKV
from runtime.executor.program.lanes import Lane


def cache_of(lane: Lane) -> HybridKV:
    """The lane's cache, which is one of a hybrid executor's."""
    return cast(HybridKV, lane.kv)


def windows_into_ram(model: Model, layers: Iterable[int], lanes: Sequence[Lane]) -> frozenset[int | None]:
    """Sliding windows (None: none) of those of the layers in which a lane sees tokens that lie in RAM."""
    windows = {model.layers[layer].sliding_window for layer in layers}
    return frozenset(window for window in windows if any(_sees(window, lane) for lane in lanes))


def _sees(window: int | None, lane: Lane) -> bool:
    first = 0 if window is None else max(lane.start - window + 1, 0)
    return first < cache_of(lane).ram_tokens
