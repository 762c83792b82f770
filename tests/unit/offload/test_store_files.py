"""What writing a store asks of the file system."""

import errno
import os
from pathlib import Path

import pytest

from offload.store_files import FILES, write_all


def test_a_reserved_file_has_its_length_and_reads_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 9000)
    descriptor = FILES.open(path)
    FILES.reserve(descriptor, 5000)
    assert path.read_bytes() == b"x" * 5000
    FILES.reserve(descriptor, 10_000)
    assert path.read_bytes() == b"x" * 5000 + bytes(5000)
    os.close(descriptor)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve_gives_the_length(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    descriptor = FILES.open(tmp_path / "file")
    FILES.reserve(descriptor, 5000)
    assert (tmp_path / "file").stat().st_size == 5000
    os.close(descriptor)


def test_a_full_drive_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    descriptor = FILES.open(tmp_path / "file")
    with pytest.raises(OSError, match="full"):
        FILES.reserve(descriptor, 5000)
    os.close(descriptor)


def test_a_system_without_direct_writes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    descriptor = FILES.open(tmp_path / "file")
    with pytest.raises(OSError, match="no direct writes"):
        FILES.set_direct(descriptor, direct=True)
    os.close(descriptor)


def test_all_is_written_where_the_system_takes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:3], offset))
    descriptor = FILES.open(tmp_path / "file")
    write_all(FILES, descriptor, b"many bytes", 2)
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"\0\0many bytes"
