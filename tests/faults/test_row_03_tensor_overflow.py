"""Row 3: products of dimensions, bytes and offsets that overflow; a zero dimension loads."""

from pathlib import Path

import pytest

from offload.gguf import GGUFFile
from tests.support.broken_gguf import BrokenFile, assert_refused, overflowing_tensors
from tests.support.gguf_bytes import GGUFBytes


@pytest.mark.parametrize("broken", [*overflowing_tensors()], ids=lambda broken: broken.name)
def test_row_03_an_overflow_is_refused(broken: BrokenFile, tmp_path: Path) -> None:
    assert_refused(broken, tmp_path)


def test_row_03_zero_dimensions_and_scalars_load(tmp_path: Path) -> None:
    file = GGUFBytes().tensor("a", 0, (4,), bytes(16)).tensor("none", 0, (0, 7)).tensor("b", 0, (2, 2), bytes(16))
    file.tensor("scalar", 0, (), bytes(4)).tensor("no rows", 12, (256, 0)).tensor("unknown", 77, (0,))
    path = tmp_path / "zero.gguf"
    path.write_bytes(file.build())
    with GGUFFile.open(path) as gguf:
        sizes = {name: (tensor.shape, tensor.num_bytes) for name, tensor in gguf.tensors.items()}
        assert gguf.read(gguf.tensors["none"]).shape == (0,)
    assert sizes["none"] == ((7, 0), 0)
    assert sizes["b"] == ((2, 2), 16)
    assert sizes["scalar"] == ((), 4)
    assert sizes["no rows"] == ((0, 256), 0)
