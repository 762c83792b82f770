"""Tables of rotary positions: the same whatever was asked for before, made with little memory besides."""

import tracemalloc

import numpy as np
import pytest

from runtime.architectures.base import Rope, RopeOrder
from runtime.executor.rotary import MORE_POSITIONS, RotaryTable, frequencies

ROPE = Rope(RopeOrder.NORM, 64, 10000.0)
POSITIONS = 30_000


@pytest.mark.parametrize("stops", [[POSITIONS], [1, 300, 5000, POSITIONS], list(range(1000, POSITIONS + 1, 1000))])
def test_a_table_grows_to_what_is_asked_for(stops: list[int]) -> None:
    table = RotaryTable(ROPE)
    for stop in stops:
        cos, sin = table.at(stop // 2, stop)
        turned = np.arange(stop // 2, stop, dtype=np.float64)[:, None] * frequencies(ROPE)
        assert np.array_equal(cos, np.cos(turned).astype(np.float32))
        assert np.array_equal(sin, np.sin(turned).astype(np.float32))
    assert table.positions <= POSITIONS + MORE_POSITIONS


def test_making_a_table_takes_little_memory_besides() -> None:
    tracemalloc.start()
    cos, _ = RotaryTable(ROPE).at(0, POSITIONS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * cos.nbytes + (4 << 20)
