"""Building stores: in any order, in several runs, in place of older ones."""

import errno
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offload import store_writer
from offload.errors import FlashError
from offload.store import Store
from offload.store_files import Files
from offload.store_writer import StoreWriter
from tests.support.stores import BUNDLES, KEY, build, contents, is_whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "store"


def partial(folder: Path) -> Path:
    return folder.with_name("store.partial")


def test_bundles_may_come_in_any_order(folder: Path) -> None:
    with StoreWriter(folder, KEY, BUNDLES) as writer:
        for index in (3, 0, 4, 1, 2):
            assert index not in writer.done
            writer.write(index, contents()[index])
            assert index in writer.done
        manifest = writer.finish()
    assert manifest.key == KEY
    assert is_whole(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["store"]


def test_the_next_run_goes_on(folder: Path) -> None:
    with StoreWriter(folder, KEY, BUNDLES) as writer:
        writer.write(1, contents()[1])
        writer.write(3, contents()[3])
    assert not folder.exists()
    with StoreWriter(folder, KEY, BUNDLES) as writer:
        assert writer.done == {1, 3}
    build(folder)
    assert is_whole(folder)


def test_a_run_that_wrote_nothing_leaves_nothing(folder: Path) -> None:
    StoreWriter(folder, KEY, BUNDLES).close()
    assert list(folder.parent.iterdir()) == []


def test_what_was_done_for_another_key_or_other_bundles_does_not_count(folder: Path) -> None:
    with StoreWriter(folder, KEY, BUNDLES) as writer:
        writer.write(0, contents()[0])
    with StoreWriter(folder, replace(KEY, layout="other"), BUNDLES) as writer:
        assert writer.done == frozenset()
        writer.write(0, contents()[0])
    with StoreWriter(folder, replace(KEY, layout="other"), BUNDLES[:-1]) as writer:
        assert writer.done == frozenset()
    build(folder)
    assert is_whole(folder)


def test_a_data_file_that_was_changed_is_written_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StoreWriter(folder, KEY, BUNDLES) as writer:
        writer.write(0, contents()[0])
    (partial(folder) / "data.bin").write_bytes(b"other")
    with caplog.at_level(logging.WARNING, "strata"), StoreWriter(folder, KEY, BUNDLES) as writer:
        assert writer.done == frozenset()
    assert "its data file was changed" in caplog.text


def test_a_new_store_takes_the_place_of_an_older_one(folder: Path) -> None:
    build(folder, key=replace(KEY, layout="older"))
    build(folder)
    assert is_whole(folder)


def test_a_folder_with_other_things_in_it_is_not_touched(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "letter").write_text("dear")
    with pytest.raises(FlashError, match="building the store failed"):
        build(folder)
    assert (folder / "letter").read_text() == "dear"
    (folder / "letter").unlink()
    build(folder)
    assert is_whole(folder)


def test_sizes_and_missing_bundles_are_checked(folder: Path) -> None:
    with StoreWriter(folder, KEY, BUNDLES) as writer:
        with pytest.raises(ValueError, match=r"3 bytes for bundle bundle\.0, which has 5000"):
            writer.write(0, np.zeros(3, np.uint8))
        with pytest.raises(ValueError, match="5 bundles were not written"):
            writer.finish()


def test_a_second_writer_is_refused_and_harms_nothing(folder: Path) -> None:
    with StoreWriter(folder, KEY, BUNDLES) as writer:
        writer.write(0, contents()[0])
        with pytest.raises(FlashError, match="another process is building this store"):
            StoreWriter(folder, KEY, BUNDLES)
        for index in range(1, len(BUNDLES)):
            writer.write(index, contents()[index])
        writer.finish()
    assert is_whole(folder)


class NoDirect(Files):
    """A file system that refuses direct writes, at once or when the first comes."""

    def __init__(self, *, late: bool) -> None:
        self.late, self.is_direct = late, False

    def set_direct(self, descriptor: int, *, direct: bool) -> None:
        if direct and not self.late:
            raise OSError(errno.EINVAL, "no")
        self.is_direct = direct

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.is_direct and len(data) >= 4096:
            raise OSError(errno.EINVAL, "no")
        return super().write(descriptor, data, offset)


@pytest.mark.parametrize("late", [False, True])
def test_where_there_are_no_direct_writes_the_page_cache_serves(folder: Path, late: bool) -> None:
    build(folder, NoDirect(late=late))
    assert is_whole(folder)


class ShortWrites(Files):
    """Writes a part of what it is given."""

    def __init__(self, most: int) -> None:
        self.most = most

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        return super().write(descriptor, data[: self.most] if len(data) >= 4096 else data, offset)


@pytest.mark.parametrize("most", [4096, 8192])
def test_short_writes_go_on(folder: Path, most: int) -> None:
    build(folder, ShortWrites(most))
    assert is_whole(folder)


def test_writes_that_take_nothing_are_an_error(folder: Path) -> None:
    with pytest.raises(FlashError, match="building the store failed: a write took no bytes"):
        build(folder, ShortWrites(0))


def test_after_an_error_nothing_more_is_written(folder: Path) -> None:
    writer = StoreWriter(folder, KEY, BUNDLES, files=ShortWrites(0))
    with pytest.raises(FlashError, match="a write took no bytes"):
        writer.write(0, contents()[0])
    with pytest.raises(FlashError, match="an earlier write failed"):
        writer.write(1, contents()[1])
    writer.close()
    writer.close()


def test_large_bundles_are_written_piece_by_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "WRITE_BYTES", 8192)
    data = np.random.default_rng(0).integers(0, 256, 50_001, np.uint8)
    with StoreWriter(folder, KEY, [("large", data.nbytes)]) as writer:
        writer.write(0, data)
        writer.finish()
    with Store.open(folder, KEY) as store:
        read = np.empty_like(data)
        store.read_into(0, read)
    np.testing.assert_array_equal(read, data)


def test_several_threads_may_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "BATCH_BYTES", 20_000)
    sizes = [1 + 997 * index % 9000 for index in range(200)]
    data = contents(sizes)
    named = [(str(index), size) for index, size in enumerate(sizes)]
    with StoreWriter(folder, KEY, named) as writer, ThreadPoolExecutor(4) as pool:
        for written in [pool.submit(writer.write, index, data[index]) for index in range(len(sizes))]:
            written.result()
        writer.finish()
    with Store.open(folder, KEY) as store:
        assert store.verify() == ()
        for index, expected in enumerate(data):
            read = np.empty_like(expected)
            store.read_into(index, read)
            np.testing.assert_array_equal(read, expected)


def test_a_store_may_be_empty(folder: Path) -> None:
    with StoreWriter(folder, KEY, []) as writer:
        writer.finish()
    with Store.open(folder, KEY) as store:
        assert store.verify() == ()
