"""Activation buffers against their description."""

import numpy as np
import pytest

from cpu_kernels.activations import ActivationBuffer, ActivationKind, padded_columns, quantize_row
from cpu_kernels.formats import panel_format
from cpu_kernels.isa import BY_NAME, ISA, current, runnable_isas
from cpu_kernels.matmul import matmul_row
from cpu_kernels.quant_types import quant_type
from tests.support.kernel_products import quantised, run


def _blocks(buffer: ActivationBuffer, n: int, blocks: int) -> list[tuple[np.ndarray, ...]]:
    """Codes, scales and sums of every column, read by the description of the layout."""
    columns = []
    tile = buffer.isa.tile_columns
    for column in range(n):
        first = column // tile * tile
        width = min(tile, padded_columns(n, buffer.isa) - first)
        size = 48 * width * blocks
        part = buffer.data[48 * first * blocks :][:size].reshape(blocks, 48 * width)
        codes = part[:, : 32 * width].reshape(blocks, 8, width, 4)[:, :, column - first].reshape(blocks, 32)
        numbers = np.ascontiguousarray(part[:, 32 * width :]).view(np.float32).reshape(blocks, 4, width)
        columns.append((codes.view(np.int8), numbers[:, 0, column - first], numbers[:, 1:, column - first]))
    return columns


@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 64), (11, 100), (16, 31)])
def test_int8_blocks(isa: ISA, n: int, k: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, k)).astype(np.float32)
    x[0, :5] = 0
    buffer = ActivationBuffer.allocate(ActivationKind.INT8, k, n, isa)
    run(quantize_row(x.ctypes.data, x.strides[0], n, buffer))
    blocks = -(-k // 32)
    for row, (codes, scales, sums) in zip(quantised(x), _blocks(buffer, n, blocks), strict=True):
        values = (codes.astype(np.float64) * scales[:, None]).reshape(-1)
        assert np.array_equal(values[:k], row)
        assert not codes.reshape(-1)[k:].any()
        halves = codes.astype(np.float32).reshape(blocks, 2, 16).sum(axis=2)
        assert np.array_equal(sums, -np.stack([halves.sum(axis=1), halves[:, 0], halves[:, 1]], axis=1))


def test_blocks_too_small_become_zeros() -> None:
    x = np.full((1, 32), 1e-31, dtype=np.float32)
    buffer = ActivationBuffer.allocate(ActivationKind.INT8, 32, 1, current())
    run(quantize_row(x.ctypes.data, x.strides[0], 1, buffer))
    assert not buffer.data[:36].any()


def test_float_columns() -> None:
    x = np.random.default_rng(2).standard_normal((3, 40)).astype(np.float32)
    isa = BY_NAME["generic"]
    buffer = ActivationBuffer.allocate(ActivationKind.FLOAT32, 40, 3, isa)
    run(quantize_row(x.ctypes.data, x.strides[0], 3, buffer))
    held = buffer.data.view(np.float32).reshape(64, 4)
    assert np.array_equal(held[:40, :3].T, x)
    assert not held[40:].any()
    assert not held[:, 3].any()


@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize(("n", "k"), [(1, 64), (3, 96), (5, 200)])
def test_tables(isa: ISA, n: int, k: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, k)).astype(np.float32)
    buffer = ActivationBuffer.allocate(ActivationKind.TABLES, k, n, isa)
    run(quantize_row(x.ctypes.data, x.strides[0], n, buffer))
    blocks = -(-k // 64)
    padded = np.zeros((n, blocks, 4, 4, 4))
    padded.reshape(n, -1)[:, :k] = x
    signs = np.array([[1 if place >> bit & 1 else -1 for place in range(16)] for bit in range(4)])
    for column in range(n):
        first = column // isa.tile_columns * isa.tile_columns
        width = min(isa.tile_columns, padded_columns(n, isa) - first)
        part = buffer.data[320 * first * blocks :][: 320 * width * blocks].reshape(blocks, -1)
        tables = part[:, : 256 * width].reshape(blocks, 4, width, 4, 16)[:, :, column - first].astype(int) - 128
        numbers = np.ascontiguousarray(part[:, 256 * width :]).view(np.float32).reshape(blocks, 16, width)
        numbers = numbers[:, :, column - first]
        scale = 2 * numbers[:, 0]
        assert np.allclose(scale * 127, np.abs(padded[column]).sum(axis=3).max(axis=(1, 2)), rtol=1e-6)
        assert np.array_equal(tables, -tables[..., ::-1])
        assert np.abs(tables).max() == 127
        exact = padded[column] @ signs
        assert np.abs(tables - exact / scale[:, None, None, None]).max() < 0.5001
        quarters = padded[column].sum(axis=(2, 3)) / 2
        halves = quarters.reshape(blocks, 2, 2).sum(axis=2)
        sums = np.concatenate([halves.sum(axis=1, keepdims=True), halves, quarters], axis=1)
        assert np.allclose(numbers[:, 1:8], sums, atol=1e-5)


def test_padding_of_columns() -> None:
    isa = BY_NAME["generic"]
    assert [padded_columns(n, isa) for n in (1, 2, 3, 4, 5, 7, 8, 9)] == [1, 2, 4, 4, 5, 8, 8, 9]


def test_sizes_below_one_are_refused() -> None:
    for k, n in ((0, 1), (32, 0)):
        with pytest.raises(ValueError, match="activation buffer"):
            ActivationBuffer.allocate(ActivationKind.INT8, k, n, current())


def test_activations_that_do_not_fit_panels_are_refused() -> None:
    form = panel_format(quant_type("Q4_0"), current())
    buffer = form.activations(64, 4)
    with pytest.raises(ValueError, match="cannot be multiplied"):
        matmul_row(form, 0, 16, 96, buffer, 0, 64, 1)
    with pytest.raises(ValueError, match="cannot be multiplied"):
        matmul_row(panel_format(quant_type("F16"), current()), 0, 16, 64, buffer, 0, 64, 1)
    with pytest.raises(ValueError, match="5 columns in a buffer for 4"):
        matmul_row(form, 0, 16, 64, buffer, 0, 64, 5)
