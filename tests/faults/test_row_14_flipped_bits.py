"""Row 14: no flipped bit in a store goes undetected, and bytes that are wrong are never handed out."""

from pathlib import Path

import numpy as np
import pytest

from offload import gguf_source, store
from offload.errors import FlashError, ModelFormatError
from offload.store import Store
from tests.support.stores import BUNDLES, KEY, build, contents

FLIPS = 10_000


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ 1 << bit]))


def is_noticed(folder: Path) -> bool:
    try:
        with Store.open(folder, KEY) as opened:
            return bool(opened.verify())
    except (FlashError, ModelFormatError):
        return True


def test_row_14_none_of_many_random_flips_is_undetected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "VERIFY_THREADS", 1)
    folder = tmp_path / "store"
    build(folder)
    rng = np.random.default_rng(1)
    paths = [folder / "data.bin", folder / "manifest.json"]
    sizes = [path.stat().st_size for path in paths]
    undetected = []
    for _ in range(FLIPS):
        which = int(rng.random() < 0.3)
        position, bit = int(rng.integers(sizes[which])), int(rng.integers(8))
        flip(paths[which], position, bit)
        if not is_noticed(folder):
            undetected.append((paths[which].name, position, bit))
        flip(paths[which], position, bit)
    assert undetected == []
    assert not is_noticed(folder)


def test_row_14_damaged_bundles_are_named_and_never_handed_out(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    build(folder)
    with Store.open(folder) as opened:
        for index in (0, 3):
            flip(opened.path, opened.place(index).offset + 17, 3)
    with Store.open(folder, KEY) as opened:
        assert opened.verify() == ("bundle.0", "bundle.3")
        for index, data in enumerate(contents()):
            read = np.empty_like(data)
            if index in (0, 3):
                with pytest.raises(FlashError, match=rf"data.bin: bundle bundle\.{index} is damaged"):
                    opened.read_into(index, read)
                assert not opened.check(index, read)
            else:
                opened.read_into(index, read)
                np.testing.assert_array_equal(read, data)


def test_row_14_what_was_read_wrongly_once_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    build(folder)
    read, calls = gguf_source.positional_read, [0]

    def wrong_once(descriptor: int, destination: memoryview, offset: int) -> int:
        count = read(descriptor, destination, offset)
        calls[0] += 1
        if calls[0] == 1:
            destination[5] ^= 1
        return count

    with Store.open(folder, KEY) as opened:
        monkeypatch.setattr(gguf_source, "positional_read", wrong_once)
        data = np.empty(BUNDLES[0][1], np.uint8)
        opened.read_into(0, data)
    np.testing.assert_array_equal(data, contents()[0])
    assert calls[0] == 2
