"""Row 10: a model file replaced, truncated or written to while it is open: an error that names it or the old bytes."""

import os
from pathlib import Path

import numpy as np
import pytest

from offload import gguf_source
from offload.errors import FlashError
from offload.gguf import GGUFFile
from tests.support.gguf_bytes import GGUFBytes

DATA = bytes(range(256)) * 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFBytes().tensor("t", 0, (256,), DATA).build())
    return path


def test_row_10_a_truncated_file_is_named(path: Path) -> None:
    with GGUFFile.open(path) as gguf:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(FlashError, match=r"model\.gguf: the file changed while in use .*bytes at opening"):
            gguf.read(gguf.tensors["t"])


def test_row_10_bytes_written_over_are_not_handed_out(path: Path) -> None:
    with GGUFFile.open(path) as gguf:
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(-512, os.SEEK_END)
            file.write(bytes(512))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        destination = np.empty(16, dtype=np.uint8)
        with pytest.raises(FlashError, match="it was written to"):
            gguf.read_into(gguf.tensors["t"], destination)


def test_row_10_a_file_moved_into_its_place_leaves_the_open_one_whole(path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(path) as gguf:
        other = tmp_path / "other.gguf"
        other.write_bytes(bytes(len(DATA)))
        other.replace(path)
        assert bytes(gguf.read(gguf.tensors["t"])) == DATA
        path.unlink()
        assert bytes(gguf.read(gguf.tensors["t"])) == DATA


def test_row_10_an_end_of_file_where_there_is_none_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GGUFFile.open(path) as gguf:
        monkeypatch.setattr(gguf_source, "positional_read", lambda descriptor, destination, offset: 0)
        with pytest.raises(FlashError, match=r"model\.gguf: the file ends at byte"):
            gguf.read(gguf.tensors["t"])


def test_row_10_a_change_during_opening_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = gguf_source.positional_read

    def read_and_touch(descriptor: int, destination: memoryview, offset: int) -> int:
        os.truncate(path, 10)
        return read(descriptor, destination, offset)

    monkeypatch.setattr(gguf_source, "positional_read", read_and_touch)
    with pytest.raises(FlashError, match="changed while in use"):
        GGUFFile.open(path)
