"""Row 5: an alignment of zero, not a power of two, of the wrong type or above 1 MiB."""

from pathlib import Path

import pytest

from offload.gguf import GGUFFile
from tests.support.broken_gguf import BrokenFile, assert_refused, bad_alignments
from tests.support.gguf_bytes import U32, GGUFBytes


@pytest.mark.parametrize("broken", [*bad_alignments()], ids=lambda broken: broken.name)
def test_row_05_a_bad_alignment_is_refused(broken: BrokenFile, tmp_path: Path) -> None:
    assert_refused(broken, tmp_path)


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096, 1 << 20])
def test_row_05_powers_of_two_are_kept(alignment: int, tmp_path: Path) -> None:
    file = GGUFBytes(alignment=alignment).value("general.alignment", U32, alignment)
    file.tensor("a", 0, (3,), b"abcdefghijkl").tensor("b", 0, (1,), b"mnop")
    path = tmp_path / "aligned.gguf"
    path.write_bytes(file.build())
    with GGUFFile.open(path) as gguf:
        assert gguf.alignment == alignment
        assert bytes(gguf.read(gguf.tensors["b"])) == b"mnop"
        assert all(tensor.offset % alignment == 0 for tensor in gguf.tensors.values())
