"""Reading by position, with what the system has."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from offload import gguf_source
from offload.gguf_source import ByteSource

READERS = [gguf_source._read_preadv, gguf_source._read_pread, gguf_source._read_seek]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_every_way_to_read_gives_the_same_bytes(
    reader: Callable[[int, memoryview, int], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    monkeypatch.setattr(gguf_source, "positional_read", reader)
    source = ByteSource(path)
    data = bytearray(50)
    source.read_into(memoryview(data), 100)
    assert data == bytes(range(100, 150))
    assert source.size == 200
    source.close()
    assert source.closed


def test_the_best_way_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for name in ("preadv", "pread", None):
        chosen.append(gguf_source.default_positional_read())
        if name:
            monkeypatch.delattr(os, name)
    assert chosen == READERS
