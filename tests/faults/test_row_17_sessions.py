"""Rows 12 and 17: blocks of a session that come too late, or for which there is no memory, are computed or not kept."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from offload import flash, gguf_source, kv_session_folder
from offload.kv_session_block import Refusal
from offload.kv_session_reader import read_blocks
from runtime.engine import Engine
from runtime.session_saved import SavedSession
from tests.support.kv_blocks import DIGESTS, SIZE, filled
from tests.support.models import FAMILIES, write_model
from tests.support.sessions import NAME, answer, first_turn, tokens

MOST_CALLS = 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write_model(tmp_path_factory.mktemp("models") / "llama.gguf", FAMILIES["llama"], "Q8_0")
    with Engine(path, threads=1, context_tokens=256, gpu="off") as made:
        yield made


class Failing:
    """Stands for a function that gives memory: fails at the calls `first` to `last`."""

    def __init__(self, real: Callable[..., NDArray[np.uint8]], first: int, last: int) -> None:
        self.real, self.failing = real, range(first, last + 1)
        self.calls = 0

    def __call__(self, num_bytes: int, **options: bool) -> NDArray[np.uint8]:
        self.calls += 1
        if self.calls in self.failing:
            raise MemoryError(f"{num_bytes} bytes")
        return self.real(num_bytes, **options)


@pytest.mark.parametrize("lasting", [False, True])
def test_row_17_memory_that_fails_at_any_call_of_a_turn(
    engine: Engine, tmp_path: Path, lasting: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = first_turn(engine, tmp_path / "before")
    expected, _ = answer(engine, turn)
    computed = set()
    for first in range(1, MOST_CALLS):
        root, last = tmp_path / str(first), MOST_CALLS * 10 if lasting else first
        shutil.copytree(tmp_path / "before", root)
        reading, writing = (
            Failing(real, first, last) for real in (flash.read_buffer, kv_session_folder.reserved_bytes)
        )
        with monkeypatch.context() as patch:
            patch.setattr(flash, "read_buffer", reading)
            patch.setattr(kv_session_folder, "reserved_bytes", writing)
            with SavedSession(NAME, root) as saved:
                pieces, count = answer(engine, turn, saved)
        assert tokens(pieces) == tokens(expected)
        computed.add(count)
        with SavedSession(NAME, root) as saved:
            assert saved.document is not None
            assert tokens(answer(engine, turn, saved)[0]) == tokens(expected)
        if max(reading.calls, writing.calls) < first:
            break
    else:
        pytest.fail(f"no clean run within {MOST_CALLS} calls")
    assert computed == {len(turn), len(turn) - 128}
    assert "tokens from 0 on are computed again" in caplog.text
    assert "there is no memory to read to" in caplog.text
    assert "KV is not kept: " in caplog.text


def test_row_12_a_read_that_hangs_refuses_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = filled(tmp_path)
    reading, over, hung = gguf_source.positional_read, threading.Event(), threading.Event()

    def hangs_once(descriptor: int, destination: memoryview, offset: int) -> int:
        if len(destination) >= SIZE.file_bytes and not hung.is_set():
            hung.set()
            over.wait(20)
        return reading(descriptor, destination, offset)

    monkeypatch.setattr(gguf_source, "positional_read", hangs_once)
    found: list[int] = []
    paths = [(blocks.path(digest), digest) for digest in DIGESTS]
    try:
        refused = read_blocks(paths, SIZE, lambda index, _: found.append(index), deadline_s=0.2)
    finally:
        over.set()
    assert refused is not None
    assert refused.fault.refusal is Refusal.UNREADABLE
    assert refused.index not in found
