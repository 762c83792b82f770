"""Rows 10 to 12 for weights read while a model runs: passing errors are survived, others fail one request alone."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from offload import gguf_source
from offload.errors import FlashError
from offload.flash import ReadMode
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor
from tests.support import models, programs
from tests.support.failing_reads import FailingReads

IDS = models.prompt(length=12)
SLOTS = 6
FOR_GOOD = 1 << 30


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "moe.gguf", models.spec_of("qwen3moe"), "Q8_0")


@pytest.fixture(scope="module")
def wanted(path: Path) -> np.ndarray:
    return programs.logits_of(path, IDS)


def logits(runner: ProgramExecutor) -> np.ndarray:
    return runner.forward([Step(IDS, runner.new_kv(32))], logits="all")[0]


@pytest.mark.parametrize("mode", list(ReadMode))
def test_row_11_a_passing_eio_at_any_read_is_survived(
    path: Path, wanted: np.ndarray, mode: ReadMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, calls = 1, 2
    while first <= calls:
        with programs.streaming(path, SLOTS, mode=mode) as (runner, _), monkeypatch.context() as patch:
            reads = FailingReads(first, 2)
            patch.setattr(gguf_source, "positional_read", reads)
            np.testing.assert_array_equal(logits(runner), wanted)
            calls = min(reads.calls, 40)
        first += 3


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV])
def test_row_11_a_drive_that_fails_for_good_fails_the_request_alone(
    path: Path, wanted: np.ndarray, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first in (1, 2, 5, 11, 23):
        with programs.streaming(path, SLOTS) as (runner, streamed):
            kv = runner.new_kv(32)
            with monkeypatch.context() as patch:
                patch.setattr(gguf_source, "positional_read", FailingReads(first, FOR_GOOD, code))
                with pytest.raises(FlashError, match=r"moe\.gguf: reading at byte \d+ failed: injected"):
                    runner.forward([Step(IDS, kv)])
            assert kv.length == 0
            np.testing.assert_array_equal(logits(runner), wanted)
            assert streamed.cache.recover() is None, "nothing is left of it"


def test_row_12_a_read_that_hangs_is_given_up(path: Path, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, read, hanging = threading.Event(), gguf_source.positional_read, threading.Semaphore(1)

    def hang(descriptor: int, destination: memoryview, offset: int) -> int:
        if hanging.acquire(blocking=False):
            go_on.wait(60)
        return read(descriptor, destination, offset)

    with programs.streaming(path, SLOTS, deadline_s=0.2) as (runner, _):
        with monkeypatch.context() as patch:
            patch.setattr(gguf_source, "positional_read", hang)
            with pytest.raises(FlashError, match=r"has taken more than 0\.2 s"):
                logits(runner)
        np.testing.assert_array_equal(logits(runner), wanted)
        go_on.set()
        np.testing.assert_array_equal(logits(runner), wanted)


@pytest.mark.parametrize("mode", list(ReadMode))
def test_row_10_a_file_written_to_while_in_use_is_noticed(tmp_path: Path, mode: ReadMode) -> None:
    path = models.write_model(tmp_path / "moe.gguf", models.spec_of("qwen3moe"), "Q8_0")
    with programs.streaming(path, SLOTS, mode=mode) as (runner, _):
        logits(runner)
        os.utime(path, ns=(1, 1))
        with pytest.raises(FlashError, match="changed while in use"):
            logits(runner)


def test_row_10_a_file_cut_short_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "moe.gguf", models.spec_of("qwen3moe"), "Q8_0")
    with programs.streaming(path, SLOTS) as (runner, _):
        os.truncate(path, 8192)
        with pytest.raises(FlashError, match="changed while in use"):
            logits(runner)
