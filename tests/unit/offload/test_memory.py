"""Memory from the system."""

import sys
from pathlib import Path

import numpy as np
import pytest

from offload.memory import reserved_bytes

MIB = 1 << 20


@pytest.mark.parametrize("huge_pages", [True, False])
@pytest.mark.parametrize("num_bytes", [0, 1, 4097, 5 * MIB])
def test_memory_is_zeroed_and_writable(num_bytes: int, huge_pages: bool) -> None:
    memory = reserved_bytes(num_bytes, huge_pages=huge_pages)
    assert memory.size == max(num_bytes, 1)
    assert memory.ctypes.data % 4096 == 0
    assert not memory.any()
    memory[:] = 7
    assert memory.sum(dtype=np.int64) == 7 * memory.size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_small_pages_take_ram_where_they_are_written() -> None:
    before = resident_bytes()
    memory = reserved_bytes(256 * MIB, huge_pages=False)
    memory[:: 4 * MIB] = 1
    assert resident_bytes() - before < 4 * MIB


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
