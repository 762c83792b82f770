"""The drive's probe: real files, file systems without direct reads, and drives that are full."""

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest

from offload import flash_probe
from offload.flash_probe import DEPTHS, SIZES, filesystem_key, probe


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_probe, "LEAST_FILE_BYTES", 8 << 20)
    monkeypatch.setattr(flash_probe, "PROBE_FILE_BYTES", 16 << 20)


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    figures = probe(tmp_path, seconds_a_point=0.002)
    assert {(read.read_bytes, read.depth) for read in figures.reads} == {(s, d) for s in SIZES for d in DEPTHS}
    assert all(read.bytes_per_s > 0 for read in figures.reads)
    assert figures.write_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_is_only_read(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(os.urandom(8 << 20))
    figures = probe(file, seconds_a_point=0.002)
    assert figures.write_bytes_per_s == 0
    assert figures.reads


def test_a_path_that_is_not_there_yet_stands_for_its_folder(tmp_path: Path) -> None:
    assert filesystem_key(tmp_path / "not" / "there") == filesystem_key(tmp_path)
    assert probe(tmp_path / "not", seconds_a_point=0.001).reads


def test_without_direct_reads_the_buffered_ones_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse_direct(path: Path, flags: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "no direct reads here")
        return opened(path, flags)

    monkeypatch.setattr("offload.flash_probe.os.open", refuse_direct)
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(8 << 20))
    assert {read.direct for read in probe(file, seconds_a_point=0.001).reads} == {False}


def test_a_full_drive_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = namedtuple("space", "f_bavail f_frsize")
    monkeypatch.setattr("offload.flash_probe.os.statvfs", lambda _: space(100, 4096))
    with pytest.raises(OSError, match="too little free space"):
        probe(tmp_path)
