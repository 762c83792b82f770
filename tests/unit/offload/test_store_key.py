"""Keys: what tells one model file from another."""

import os
from pathlib import Path

import pytest

from offload.gguf import GGUFFile
from offload.store_key import StoreKey, store_key
from tests.support.gguf_bytes import small_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(small_model().build())
    os.utime(path, ns=(10**18, 10**18))
    return path


def key_of(path: Path, layout: str = "layout") -> StoreKey:
    with GGUFFile.open(path) as gguf:
        return store_key(gguf, layout)


def test_the_same_file_has_the_same_key(path: Path) -> None:
    key = key_of(path)
    assert key == key_of(path)
    assert key.digest == key_of(path).digest
    assert key.sources[0].path == path
    assert len(key.digest) == 12


def test_a_file_that_was_moved_keeps_its_key(path: Path, tmp_path: Path) -> None:
    key = key_of(path)
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / path.name)
    assert key_of(moved) == key
    assert key_of(moved).digest == key.digest


def test_anything_else_makes_another_key(path: Path) -> None:
    keys = [key_of(path), key_of(path, "other layout"), key_of(path.rename(path.with_name("other.gguf")))]
    path = path.with_name("other.gguf")
    os.utime(path, ns=(10**18, 10**18 + 1))
    keys.append(key_of(path))
    data = bytearray(path.read_bytes())
    place = data.index(b"general.architecture")
    data[place : place + 20] = b"general.architecturE"
    path.write_bytes(data + bytes(32))
    os.utime(path, ns=(10**18, 10**18 + 1))
    keys.append(key_of(path))
    assert len({key.digest for key in keys}) == len(keys)
    assert all(list(a.differences(b)) for a in keys for b in keys if a is not b)
    assert list(keys[3].differences(keys[4])) == [f"other.gguf had {len(data)} bytes, it has {len(data) + 32} now"]


def test_another_number_of_shards_is_told(path: Path) -> None:
    key = key_of(path)
    assert list(StoreKey(key.sources * 2, key.layout).differences(key)) == ["2 source files, not 1"]
