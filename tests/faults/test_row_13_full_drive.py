"""Row 13: space is reserved before a store is written, and no half store is left under its final name."""

import errno
from pathlib import Path

import pytest

from offload import store_writer
from offload.errors import FlashError
from offload.store_files import Files
from tests.support.stores import FailingFiles, build, is_whole

MOST_CALLS = 80


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "BATCH_BYTES", 6000)
    monkeypatch.setattr(store_writer, "WRITE_BYTES", 4096)


class FullDrive(Files):
    """Has 10 KiB left."""

    def free_bytes(self, folder: Path) -> int:
        return 10 << 10


def test_row_13_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        FlashError, match=r"store: the store needs 0\.0 MiB more on this drive, 0\.0 MiB were free"
    ) as e:
        build(tmp_path / "store", FullDrive())
    assert e.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("lasting", [False, True])
def test_row_13_a_failure_at_any_call_leaves_a_whole_store_or_none(tmp_path: Path, code: int, lasting: bool) -> None:
    for first in range(1, MOST_CALLS):
        folder = tmp_path / str(first) / "store"
        files = FailingFiles(first, MOST_CALLS * 2 if lasting else first, code)
        try:
            build(folder, files)
        except FlashError as error:
            assert str(folder.name) in str(error)
            assert error.hint
        else:
            if files.calls < first:
                assert first > 20
                return
        if folder.exists():
            assert_whole_but_for_the_journal(folder)
        build(folder)
        assert is_whole(folder)
    pytest.fail(f"no clean run within {MOST_CALLS} calls")


def assert_whole_but_for_the_journal(folder: Path) -> None:
    (folder / "journal").unlink(missing_ok=True)
    assert is_whole(folder)


def test_row_13_after_an_error_nothing_counts_that_may_be_lost(tmp_path: Path) -> None:
    """A sync that failed once may succeed when it is tried again, though the data is lost."""

    class FailsOneSync(Files):
        failed = False

        def sync(self, descriptor: int) -> None:
            if not FailsOneSync.failed and data_is_there(tmp_path):
                FailsOneSync.failed = True
                raise OSError(errno.EIO, "injected")
            super().sync(descriptor)

    with pytest.raises(FlashError, match="building the store failed"):
        build(tmp_path / "store", FailsOneSync())
    assert FailsOneSync.failed
    journal = tmp_path / "store.partial" / "journal"
    assert not journal.exists() or journal.read_bytes().count(b"\n") == 1
    build(tmp_path / "store")
    assert is_whole(tmp_path / "store")


def data_is_there(folder: Path) -> bool:
    data = folder / "store.partial" / "data.bin"
    return data.exists() and any(data.read_bytes())
