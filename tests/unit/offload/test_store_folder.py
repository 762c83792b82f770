"""The listing of stores, and removal."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import FlashError
from offload.store_folder import StoreState, list_stores, remove_store, store_folder
from offload.store_key import SourceIdentity, StoreKey
from offload.store_writer import StoreWriter
from tests.support.stores import BUNDLES, KEY, build, contents


@pytest.fixture
def key(tmp_path: Path) -> StoreKey:
    """Of a file that is there."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return replace(KEY, sources=(SourceIdentity(str(tmp_path), path.name, 7, path.stat().st_mtime_ns, 0),))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "stores"


def states(root: Path) -> list[StoreState]:
    return [entry.state for entry in list_stores(root)]


def test_names_say_model_and_key(root: Path) -> None:
    assert store_folder(root, KEY) == root / f"model-{KEY.digest}"
    sharded = replace(KEY, sources=(replace(KEY.sources[0], name="large-00001-of-00003.gguf"),))
    assert store_folder(root, sharded).name.startswith("large-")
    long = replace(KEY, sources=(replace(KEY.sources[0], name="ä" * 125 + ".gguf"),))
    assert len(store_folder(root, long).name.encode()) < 150


def test_what_is_listed(root: Path, key: StoreKey, tmp_path: Path) -> None:
    assert list_stores(root) == ()
    build(store_folder(root, key), key=key)
    (root / "something else").mkdir()
    (entry,) = list_stores(root)
    assert entry.state is StoreState.READY
    assert entry.source == tmp_path / "model.gguf"
    assert entry.num_bytes >= 28672
    remove_store(entry)
    assert list_stores(root) == ()


def test_a_source_that_changed_or_went_away_is_told(root: Path, key: StoreKey, tmp_path: Path) -> None:
    build(store_folder(root, key), key=key)
    os.utime(tmp_path / "model.gguf", ns=(5, 5))
    assert states(root) == [StoreState.SOURCE_CHANGED]
    (tmp_path / "model.gguf").unlink()
    assert states(root) == [StoreState.SOURCE_GONE]


@pytest.mark.parametrize("name", ["data.bin", "manifest.json"])
def test_a_damaged_store_is_told(root: Path, key: StoreKey, name: str) -> None:
    folder = store_folder(root, key)
    build(folder, key=key)
    (folder / name).write_bytes(b"{")
    assert states(root) == [StoreState.DAMAGED]
    (folder / name).unlink()
    assert states(root) == [StoreState.DAMAGED]


def test_an_unfinished_store_is_listed_and_can_be_removed(root: Path, key: StoreKey) -> None:
    with StoreWriter(store_folder(root, key), key, BUNDLES) as writer:
        writer.write(0, contents()[0])
        with pytest.raises(FlashError, match="another process is building this store"):
            remove_store(list_stores(root)[0])
    (entry,) = list_stores(root)
    assert entry.state is StoreState.UNFINISHED
    assert entry.source is None
    remove_store(entry)
    assert list_stores(root) == ()


def test_what_cannot_be_removed_is_named(root: Path, key: StoreKey) -> None:
    folder = store_folder(root, key)
    build(folder, key=key)
    (folder / "letter").write_text("dear")
    with pytest.raises(FlashError, match=f"{folder.name}: cannot be removed: Directory not empty"):
        remove_store(list_stores(root)[0])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlashError, match="file: cannot be listed"):
        list_stores(tmp_path / "file")
