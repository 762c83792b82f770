"""Row 11: short reads are looped, EIO is tried again within a bound; a drive that fails for good gives an error."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from offload import gguf_source
from offload.errors import FlashError
from offload.gguf import GGUFFile
from tests.support.gguf_bytes import small_model

MOST_CALLS = 20


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(small_model().build())
    return path


def everything(path: Path) -> list[bytes]:
    with GGUFFile.open(path) as gguf:
        return [bytes(gguf.read(tensor)) for tensor in gguf.tensors.values()]


def failing(first: int, last: int, code: int) -> tuple[Callable[[int, memoryview, int], int], list[int]]:
    """A read that fails at its calls `first` to `last`, and the count of its calls."""
    read, calls = gguf_source.positional_read, [0]

    def double(descriptor: int, destination: memoryview, offset: int) -> int:
        calls[0] += 1
        if first <= calls[0] <= last:
            raise OSError(code, "injected")
        return read(descriptor, destination, offset)

    return double, calls


def test_row_11_short_reads_are_looped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read = everything(path), gguf_source.positional_read
    monkeypatch.setattr(
        gguf_source, "positional_read", lambda descriptor, data, offset: read(descriptor, data[:7], offset)
    )
    assert everything(path) == whole


@pytest.mark.parametrize("times", [1, gguf_source.EIO_RETRIES])
def test_row_11_a_passing_eio_at_any_read_is_survived(path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    whole = everything(path)
    for first in range(1, MOST_CALLS):
        with monkeypatch.context() as patch:
            double, calls = failing(first, first + times - 1, errno.EIO)
            patch.setattr(gguf_source, "positional_read", double)
            assert everything(path) == whole
        if calls[0] < first:
            return
    pytest.fail(f"no clean run within {MOST_CALLS} reads")


@pytest.mark.parametrize(("code", "tries"), [(errno.EIO, 1 + gguf_source.EIO_RETRIES), (errno.ENXIO, 1)])
def test_row_11_a_lasting_error_at_any_read_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, tries: int
) -> None:
    for first in range(1, MOST_CALLS):
        with monkeypatch.context() as patch:
            double, calls = failing(first, MOST_CALLS, code)
            patch.setattr(gguf_source, "positional_read", double)
            try:
                everything(path)
            except FlashError as error:
                assert "model.gguf: reading at byte" in str(error)
                assert error.hint
                assert calls[0] == first + tries - 1
            else:
                assert calls[0] < first
                return
    pytest.fail(f"no clean run within {MOST_CALLS} reads")
