"""Measurements of the CPU: sane figures from small buffers."""

from pathlib import Path

import numpy as np
import pytest

from cpu_kernels import bandwidth

MIB = 1 << 20


def test_buffer_holds_whole_rows() -> None:
    assert bandwidth.make_buffer(0).nbytes == 4 * MIB
    assert bandwidth.make_buffer(8 * MIB + 5).nbytes == 8 * MIB


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, 128 * MIB),
        ({"index3": "32768K"}, 128 * MIB),
        ({"index0": "48K", "index3": "96M"}, 288 * MIB),
        ({"index3": "2G"}, 1024 * MIB),
        ({"index3": "?"}, 128 * MIB),
    ],
)
def test_buffer_is_beyond_the_caches(tmp_path: Path, sizes: dict[str, str], expected: int) -> None:
    for name, size in sizes.items():
        folder = tmp_path / "sys/devices/system/cpu/cpu0/cache" / name
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    assert bandwidth.buffer_bytes(tmp_path) == expected


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rates_are_positive_and_finite(threads: int) -> None:
    buffer = bandwidth.make_buffer(4 * MIB)
    for rate in (
        bandwidth.read_rate(buffer, threads),
        bandwidth.matvec_rate(buffer, MIB, threads),
        bandwidth.matvec_rate(buffer, 1 << 40, threads),
    ):
        assert 1e7 < rate < 1e13


def test_products_and_calls() -> None:
    assert 1e8 < bandwidth.matmul_flops(2) < 1e15
    assert 1e-8 < bandwidth.small_operation_seconds() < 1e-2


def test_conversion_rate_counts_the_input() -> None:
    data = np.ones(MIB, np.uint8)
    assert bandwidth.conversion_rate(lambda part: part.astype(np.float32), data) > 1e6
