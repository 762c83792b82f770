"""Row 6: a tensor's region shorter than its type needs, or over another one."""

from pathlib import Path

import pytest

from offload.gguf import GGUFFile
from tests.support.broken_gguf import BrokenFile, assert_refused, bad_regions
from tests.support.gguf_bytes import GGUFBytes


@pytest.mark.parametrize("broken", [*bad_regions()], ids=lambda broken: broken.name)
def test_row_06_a_bad_region_is_refused_naming_both(broken: BrokenFile, tmp_path: Path) -> None:
    assert_refused(broken, tmp_path)


def test_row_06_gaps_and_any_order_are_allowed(tmp_path: Path) -> None:
    file = GGUFBytes().tensor("second", 0, (4,), b"b" * 16, offset=128).tensor("first", 0, (4,), b"a" * 16, offset=0)
    path = tmp_path / "gap.gguf"
    path.write_bytes(file.build())
    with GGUFFile.open(path) as gguf:
        assert list(gguf.tensors) == ["second", "first"]
        assert bytes(gguf.read(gguf.tensors["second"])) == b"b" * 16
        assert bytes(gguf.read(gguf.tensors["first"])) == b"a" * 16
