"""Matrices of planes: sizes, rows and slots written apart, and what is refused."""

import pytest
import torch

from gpu_kernels.dequantize import dequantize
from gpu_kernels.layouts import LAYOUTS
from gpu_kernels.matrix import GpuMatrix, arrange
from tests.support.gpu_matrices import raw_rows, weights_of


@pytest.mark.parametrize("name", LAYOUTS)
def test_planes_hold_the_bytes_of_the_file(name: str) -> None:
    raw = raw_rows(name, 2, 3, 512)
    matrix = arrange(torch.from_numpy(raw), name)
    assert matrix.num_bytes == raw.nbytes == sum(plane.nbytes for plane in matrix.planes)
    held = torch.cat([plane.view(torch.uint8).flatten() for plane in matrix.planes])
    assert torch.equal(held.sort().values, torch.from_numpy(raw).flatten().sort().values)


def test_rows_and_slots_can_be_written_one_after_the_other() -> None:
    raw = torch.from_numpy(raw_rows("Q4_K", 2, 6, 512))
    matrix = GpuMatrix.allocate("Q4_K", 6, 512, slots=2)
    for slot in (1, 0):
        for first in (4, 0):
            matrix.write(slot, raw[slot, first : first + 4], first)
    whole = arrange(raw, "Q4_K")
    assert all(torch.equal(left, right) for left, right in zip(matrix.planes, whole.planes, strict=True))
    part = matrix.slot(1).rows_from(2, 3)
    assert torch.equal(dequantize(part), weights_of(raw.numpy(), "Q4_K")[1, 2:5])


def test_memory_comes_from_where_it_is_asked_for() -> None:
    asked: list[tuple[tuple[int, ...], torch.dtype]] = []

    def empty(shape: object, dtype: torch.dtype) -> torch.Tensor:
        assert isinstance(shape, tuple)
        asked.append((shape, dtype))
        return torch.empty(shape, dtype=dtype)

    matrix = GpuMatrix.allocate("Q8_0", 4, 64, empty=empty)
    assert asked == [((4, 2), torch.float16), ((4, 64), torch.int8)]
    assert matrix.plane("codes").shape == (4, 64)


def test_what_does_not_fit_is_refused() -> None:
    single, stack = GpuMatrix.allocate("Q8_0", 4, 64), GpuMatrix.allocate("Q8_0", 4, 64, slots=2)
    rows = torch.zeros((4, 68), dtype=torch.uint8)
    with pytest.raises(TypeError, match="raw rows must be uint8"):
        single.write(None, rows.view(torch.int8))
    with pytest.raises(ValueError, match="for rows of 68 bytes"):
        single.write(None, rows[:, :67])
    with pytest.raises(ValueError, match="rows 1 to 4 of 4"):
        single.write(None, rows, 1)
    with pytest.raises(ValueError, match="writing slot 0 of a matrix with slots None"):
        single.write(0, rows)
    with pytest.raises(ValueError, match="slot 2 of 2"):
        stack.slot(2)
    with pytest.raises(ValueError, match="rows 3 to 4 of 4"):
        single.rows_from(3, 2)
    with pytest.raises(ValueError, match="0 rows"):
        GpuMatrix.allocate("Q8_0", 0, 64)
    with pytest.raises(ValueError, match="not rows of whole Q8_0 blocks"):
        arrange(rows[:, :67], "Q8_0")
    with pytest.raises(KeyError, match="no field 'high'"):
        single.plane("high")
