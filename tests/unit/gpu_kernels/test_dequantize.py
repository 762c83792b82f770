"""Dequantisation of planes against the CPU's reference, bit for bit, for any bytes."""

import numpy as np
import pytest
import torch

from cpu_kernels.quant_types import quant_type
from cpu_kernels.reference.dequantize import dequantize as reference
from gpu_kernels.dequantize import dequantize
from gpu_kernels.layouts import LAYOUTS
from gpu_kernels.matrix import arrange
from tests.support.gpu_matrices import raw_rows


def same_bits(found: torch.Tensor, wanted: np.ndarray) -> None:
    """Equal bit for bit, except that any NaN equals any NaN."""
    numbers = ~np.isnan(wanted)
    assert found.dtype == torch.float32
    assert tuple(found.shape) == wanted.shape
    assert np.array_equal(np.isnan(found.numpy()), ~numbers)
    assert np.array_equal(found.numpy()[numbers].view(np.uint32), wanted[numbers].view(np.uint32))


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_bytes_give_the_reference_weights(name: str) -> None:
    kind = quant_type(name)
    rng = np.random.default_rng(kind.ggml_id)
    raw = rng.integers(0, 256, (7, 40 * kind.block_bytes), dtype=np.uint8)
    same_bits(dequantize(arrange(torch.from_numpy(raw), name)), reference(raw, kind))


@pytest.mark.parametrize("name", LAYOUTS)
def test_stacks_of_ordinary_weights(name: str) -> None:
    raw = raw_rows(name, 3, 5, 512)
    wanted = reference(raw, quant_type(name))
    assert np.isfinite(wanted).all()
    matrix = arrange(torch.from_numpy(raw), name)
    same_bits(dequantize(matrix), wanted)
    same_bits(dequantize(matrix.slot(1)), wanted[1])
