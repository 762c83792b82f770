"""Rows 10 and 11 for stores: EIO at any read is tried again within a bound, and a store that changed is not read."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from offload import gguf_source, store
from offload.errors import FlashError
from offload.store import Store
from tests.support.stores import BUNDLES, KEY, build, contents

MOST_CALLS = 30


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)
    monkeypatch.setattr(store, "VERIFY_THREADS", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(tmp_path / "store")
    return tmp_path / "store"


def read_all(folder: Path) -> None:
    """Everything, twice."""
    with Store.open(folder, KEY) as opened:
        assert opened.verify() == ()
        for index, expected in enumerate(contents()):
            data = np.empty_like(expected)
            opened.read_into(index, data)
            np.testing.assert_array_equal(data, expected)


def failing(first: int, last: int) -> tuple[Callable[[int, memoryview, int], int], list[int]]:
    """A read that fails at its calls `first` to `last`, and the count of its calls."""
    read, calls = gguf_source.positional_read, [0]

    def double(descriptor: int, destination: memoryview, offset: int) -> int:
        calls[0] += 1
        if first <= calls[0] <= last:
            raise OSError(errno.EIO, "injected")
        return read(descriptor, destination, offset)

    return double, calls


def test_row_11_a_passing_eio_at_any_read_is_survived(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in range(1, MOST_CALLS):
        with monkeypatch.context() as patch:
            double, calls = failing(first, first)
            patch.setattr(gguf_source, "positional_read", double)
            read_all(folder)
        if calls[0] < first:
            assert first == 2 * len(BUNDLES) + 1
            return
    pytest.fail(f"no clean run within {MOST_CALLS} reads")


def test_row_11_a_lasting_error_at_any_read_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in range(1, MOST_CALLS):
        with monkeypatch.context() as patch:
            double, calls = failing(first, 10 * MOST_CALLS)
            patch.setattr(gguf_source, "positional_read", double)
            try:
                read_all(folder)
            except FlashError as error:
                assert "data.bin: reading at byte" in str(error)
                assert error.hint
            else:
                assert calls[0] < first
                return
    pytest.fail(f"no clean run within {MOST_CALLS} reads")


def test_row_10_a_store_that_was_written_to_is_not_read(folder: Path) -> None:
    with Store.open(folder, KEY) as opened:
        (folder / "data.bin").write_bytes(bytes(opened.num_bytes - 1))
        with pytest.raises(FlashError, match=r"data.bin: the file changed while in use"):
            opened.read_into(0, np.empty(BUNDLES[0][1], np.uint8))


def test_row_10_a_store_that_was_made_anew_is_still_the_one_that_was_opened(folder: Path) -> None:
    with Store.open(folder, KEY) as opened:
        build(folder)
        data = np.empty(BUNDLES[3][1], np.uint8)
        opened.read_into(3, data)
    np.testing.assert_array_equal(data, contents()[3])
