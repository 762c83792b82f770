"""Rows 10 to 12 for experts read on a guess: what fails while nobody needs it costs nobody an answer."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offload import gguf_source
from offload.errors import FlashError
from offload.flash import Priority, Read
from offload.prefetch_gate import PrefetchMode
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor
from runtime.streamed import StreamedWeights
from tests.support import models, programs

IDS = models.prompt(length=12)
TOKENS = len(IDS)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder: Path) -> Path:
    """Four layers of experts."""
    return models.write_model(folder / "moe.gguf", replace(models.spec_of("qwen3moe"), blocks=4), "Q8_0")


@pytest.fixture(scope="module")
def wanted(path: Path) -> np.ndarray:
    with programs.executor(path) as runner:
        return logits(runner)


def logits(runner: ProgramExecutor) -> np.ndarray:
    """Of tokens one by one: only those are guessed for."""
    kv = runner.new_kv(TOKENS)
    return np.concatenate([runner.forward([Step([token], kv)])[0] for token in IDS])


@contextmanager
def guessing(path: Path, deadline_s: float = 30.0) -> Iterator[tuple[ProgramExecutor, StreamedWeights]]:
    """An executor that always guesses, with slots for half of the experts."""
    with programs.executor(path) as resident:
        experts = resident.model.experts
    assert experts is not None
    with programs.streaming(path, 2 * experts.count, prefetch=PrefetchMode.ON, deadline_s=deadline_s) as both:
        yield both


class FailingGuesses:
    """Fails guessed reads, the first `times` of them; of others none."""

    def __init__(self, streamed: StreamedWeights, times: int) -> None:
        self.failed = 0
        self._reader = streamed.cache.reader
        self._times = times
        self._read, self._fill = gguf_source.positional_read, self._reader._fill
        self._guessed = threading.local()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        following = self._reader._next

        def next_read() -> Read | None:
            read = following()
            self._guessed.value = read is not None and read.priority is Priority.PREFETCH
            return read

        def positional_read(descriptor: int, destination: memoryview, offset: int) -> int:
            if getattr(self._guessed, "value", False) and self.failed < self._times:
                self.failed += 1
                raise OSError(errno.ENODEV, "injected")
            return self._read(descriptor, destination, offset)

        monkeypatch.setattr(self._reader, "_next", next_read)
        monkeypatch.setattr(gguf_source, "positional_read", positional_read)


@pytest.mark.parametrize("times", [1, 3, 1 << 30])
def test_row_11_guesses_that_fail_fail_no_request(
    path: Path, wanted: np.ndarray, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guessing(path) as (runner, streamed), monkeypatch.context() as patch:
        failing = FailingGuesses(streamed, times)
        failing.install(patch)
        np.testing.assert_array_equal(logits(runner), wanted)
        np.testing.assert_array_equal(logits(runner), wanted)
        assert failing.failed >= min(times, 3)
        streamed.cache.reader.drain()
        assert streamed.cache.recover() is None


def test_row_12_a_guess_that_hangs_is_given_up(path: Path, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, read = threading.Event(), gguf_source.positional_read
    with guessing(path, deadline_s=0.2) as (runner, streamed):
        reader, hung = streamed.cache.reader, threading.Event()
        following, guessed = reader._next, threading.local()

        def next_read() -> Read | None:
            one = following()
            guessed.value = one is not None and one.priority is Priority.PREFETCH
            return one

        def hang(descriptor: int, destination: memoryview, offset: int) -> int:
            if getattr(guessed, "value", False) and not hung.is_set():
                hung.set()
                go_on.wait(60)
            return read(descriptor, destination, offset)

        monkeypatch.setattr(reader, "_next", next_read)
        monkeypatch.setattr(gguf_source, "positional_read", hang)
        np.testing.assert_array_equal(logits(runner), wanted)
        assert hung.is_set()
        go_on.set()
        np.testing.assert_array_equal(logits(runner), wanted)


def test_row_10_a_file_written_to_is_noticed_by_who_needs_it(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    with guessing(path) as (runner, _):
        logits(runner)
        os.utime(path, ns=(1, 1))
        with pytest.raises(FlashError, match="changed while in use"):
            for _ in range(4):
                logits(runner)
