"""Stores: opening, places, and reading."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offload.errors import FlashError, ModelFormatError
from offload.store import Store
from offload.store_files import BLOCK_BYTES
from tests.support.stores import BUNDLES, KEY, SIZES, build, contents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(tmp_path / "store")
    return tmp_path / "store"


def test_bundles_lie_in_whole_blocks_and_can_be_read_by_place(folder: Path) -> None:
    with Store.open(folder, KEY) as store:
        whole = store.path.read_bytes()
        assert store.num_bytes == len(whole)
        for index, data in enumerate(contents()):
            offset, num_bytes, _ = store.place(index)
            assert offset % BLOCK_BYTES == 0
            assert num_bytes == SIZES[index]
            read = np.frombuffer(whole, np.uint8)[offset : offset + num_bytes]
            np.testing.assert_array_equal(read, data)
            assert store.check(index, read)
            assert not store.check(index, read[:-1])
            assert store.index(BUNDLES[index][0]) == index


def test_what_is_asked_of_a_wrong_size_or_name_is_an_error(folder: Path) -> None:
    with Store.open(folder) as store:
        with pytest.raises(ValueError, match=r"10 bytes for bundle bundle\.0, which has 5000"):
            store.read_into(0, np.empty(10, np.uint8))
        with pytest.raises(KeyError):
            store.index("nothing")


def test_verify_tells_its_progress(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    with Store.open(folder) as store:
        assert store.verify(lambda *counts: heard.append(counts)) == ()
        assert heard[-1] == (store.num_bytes, store.num_bytes)
    assert len(heard) == len(SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bytes": 1001}, r"model.gguf had 1000 bytes, it has 1001 now"),
        ({"mtime_ns": 124}, r"model.gguf was written to since"),
        ({"header_xxh3": 4}, r"model.gguf had another header"),
        ({"name": "other.gguf"}, r"its source is model.gguf, not other.gguf"),
    ],
)
def test_a_store_of_another_source_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    source = replace(KEY.sources[0], **change)
    with pytest.raises(ModelFormatError, match=message) as error:
        Store.open(folder, replace(KEY, sources=(source,)))
    assert error.value.hint


def test_a_store_of_another_layout_is_refused(folder: Path) -> None:
    with pytest.raises(ModelFormatError, match="its layout is layout, not avx1024"):
        Store.open(folder, replace(KEY, layout="avx1024"))


def test_the_place_of_the_source_does_not_count(folder: Path) -> None:
    Store.open(folder, replace(KEY, sources=(replace(KEY.sources[0], folder="/elsewhere"),))).close()


def test_a_cut_data_file_is_refused(folder: Path) -> None:
    with (folder / "data.bin").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(ModelFormatError, match=r"data.bin: has 4096 bytes, the manifest says 32768"):
        Store.open(folder)


@pytest.mark.parametrize("name", ["manifest.json", "data.bin"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FlashError, match=f"{name}: .*cannot be"):
        Store.open(folder)
