"""Blocks of KV are handed over in any order, or in an order as narrow as who takes them needs it."""

import time
from pathlib import Path

import pytest

from offload import gguf_source
from offload.kv_session_reader import read_blocks
from tests.support.kv_blocks import DIGESTS, SIZE, filled


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_some_at_once_are_handed_over_before_others(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, read = filled(tmp_path), gguf_source.positional_read
    paths = [(blocks.path(digest), digest) for digest in DIGESTS]
    slow = {path.stat().st_ino for path, _ in paths[::at_once]}
    found: list[int] = []

    def waits(descriptor: int, destination: memoryview, offset: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").stat().st_ino in slow:
            time.sleep(0.05)
        return read(descriptor, destination, offset)

    monkeypatch.setattr(gguf_source, "positional_read", waits)
    assert read_blocks(paths, SIZE, lambda index, _: found.append(index), at_once=at_once) is None
    groups = [sorted(found[first : first + at_once]) for first in range(0, len(found), at_once)]
    assert [index for group in groups for index in group] == list(range(len(DIGESTS)))
