"""Rows 10 to 14 where experts and keys and values come from flash in one pass: never a wrong token, nothing stays hung.

An error in either ends what depends on it: a sequence whose keys and values cannot be read is computed again, a request
whose experts cannot be read fails; the next pass finds nothing of it.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.pool import Pool
from offload import gguf_source
from offload.errors import FlashError, SequenceError
from offload.flash import ReadMode
from runtime.executor.program import ProgramExecutor, ProgramKV
from tests.faults.test_row_11_spilled_kv import flip
from tests.support.failing_reads import FailingReads
from tests.support.models import spec_of, write_model
from tests.support.spilled import IDS, TOKENS, plain_logits, run, spilling
from tests.support.stores import FailingFiles

MORE = 2
SLOTS = 64
FOR_GOOD = 1 << 30

pytestmark = pytest.mark.usefixtures("no_read_pauses")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "moe.gguf", spec_of("qwen3moe"), "Q8_0")


@pytest.fixture(scope="module")
def expected(path: Path) -> list[NDArray[np.float32]]:
    return plain_logits(path, TOKENS, MORE)


@contextmanager
def filled(path: Path, **options: object) -> Iterator[tuple[ProgramExecutor, ProgramKV]]:
    """A sequence of `TOKENS` of which pieces lie on flash, beside experts of which few are in RAM."""
    with spilling(path, 2, slots=SLOTS, **options) as executor:  # type: ignore[arg-type]
        kv = executor.new_kv(TOKENS + 64)
        run(executor, kv, IDS[:TOKENS])
        assert executor.kv_tiers.cold_pieces >= 2
        few(executor)
        yield executor, kv


def few(executor: ProgramExecutor) -> None:
    """Leaves a token's experts of one layer in RAM, so that the next tokens read some."""
    assert executor.model.experts is not None
    executor._weights.streamed.cache.resize(executor.model.experts.used_count)  # type: ignore[union-attr]


def many(executor: ProgramExecutor) -> None:
    """Lets a prompt have the slots that it needs again."""
    executor._weights.streamed.cache.resize(SLOTS)  # type: ignore[union-attr]


def next_logits(executor: ProgramExecutor, kv: ProgramKV) -> list[NDArray[np.float32]]:
    start = kv.length
    return [run(executor, kv, IDS[start + index : start + index + 1]) for index in range(MORE)]


def all_equal(rows: list[NDArray[np.float32]], wanted: list[NDArray[np.float32]]) -> bool:
    return all(np.array_equal(row, its) for row, its in zip(rows, wanted, strict=True))


@pytest.mark.parametrize("mode", list(ReadMode))
def test_row_11_a_passing_eio_at_any_read_is_survived(
    path: Path, expected: list[NDArray[np.float32]], mode: ReadMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(path, mode=mode) as (executor, kv):
        first, calls = 1, 2
        while first <= calls:
            with monkeypatch.context() as patch:
                reads = FailingReads(first, 2)
                patch.setattr(gguf_source, "positional_read", reads)
                assert all_equal(next_logits(executor, kv), expected[1:])
                calls = reads.calls
            kv.truncate(TOKENS)
            first += 2
        assert calls > 6, "both are read"


@pytest.mark.parametrize("mode", list(ReadMode))
def test_row_11_what_fails_for_good_ends_what_needs_it(
    path: Path, expected: list[NDArray[np.float32]], mode: ReadMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any read on everything fails: whichever of the two is asked first is told; then all is as before."""
    told: set[type] = set()
    with filled(path, mode=mode) as (executor, kv):
        for first in range(1, 14, 2):
            few(executor)
            with monkeypatch.context() as patch:
                patch.setattr(gguf_source, "positional_read", FailingReads(first, FOR_GOOD))
                with pytest.raises((FlashError, SequenceError), match="injected") as raised:
                    for _ in range(8):
                        next_logits(executor, kv)
                        kv.truncate(TOKENS)
            told.add(type(raised.value))
            if isinstance(raised.value, SequenceError):
                assert raised.value.kv is kv
                assert raised.value.kept_tokens in range(0, TOKENS, 512)
            kv.truncate(TOKENS)
            assert all_equal(next_logits(executor, kv), expected[1:]), "the drive is well again"
            kv.truncate(TOKENS)
    assert SequenceError in told


class OneFile:
    """Reads of one file fail, those of others do not."""

    def __init__(self, fails: Path) -> None:
        self._number = fails.stat().st_ino
        self._read = gguf_source.positional_read

    def __call__(self, descriptor: int, destination: memoryview, offset: int) -> int:
        if os.fstat(descriptor).st_ino == self._number:
            raise OSError(5, "injected")
        return self._read(descriptor, destination, offset)


def test_row_11_experts_fail_while_keys_and_values_arrive(
    path: Path, expected: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(path) as (executor, kv):
        for _ in range(3):
            few(executor)
            with monkeypatch.context() as patch:
                patch.setattr(gguf_source, "positional_read", OneFile(path))
                with pytest.raises((FlashError, SequenceError), match=r"moe\.gguf.* failed: injected") as raised:
                    for _ in range(8):
                        next_logits(executor, kv)
                        kv.truncate(TOKENS)
            assert not isinstance(raised.value, SequenceError), "no keys and values were lost"
            kv.truncate(TOKENS)
            assert all_equal(next_logits(executor, kv), expected[1:])
            kv.truncate(TOKENS)


def test_row_11_keys_and_values_fail_while_experts_arrive(
    path: Path, expected: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(path) as (executor, kv):
        spill = executor.kv_tiers.store.spill
        assert spill is not None
        few(executor)
        with monkeypatch.context() as patch:
            patch.setattr(gguf_source, "positional_read", OneFile(Path(f"/proc/self/fd/{spill._descriptor}")))
            with pytest.raises(SequenceError, match="were lost") as raised:
                next_logits(executor, kv)
        kv.truncate(raised.value.kept_tokens)
        many(executor)
        assert np.array_equal(run(executor, kv, IDS[kv.length : TOKENS]), expected[0])
        assert all_equal(next_logits(executor, kv), expected[1:])


def test_row_12_reads_of_both_that_hang_are_given_up(
    path: Path, expected: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open, read = threading.Event(), gguf_source.positional_read

    def hang(descriptor: int, destination: memoryview, offset: int) -> int:
        assert is_open.wait(30)
        return read(descriptor, destination, offset)

    with filled(path, deadline_s=0.3) as (executor, kv):
        with monkeypatch.context() as patch:
            patch.setattr(gguf_source, "positional_read", hang)
            with pytest.raises((FlashError, SequenceError), match=r"has taken more than 0.3 s"):
                next_logits(executor, kv)
        is_open.set()
        kv.truncate(TOKENS)
        assert all_equal(next_logits(executor, kv), expected[1:])


def test_row_14_a_flipped_bit_of_either_is_never_used(path: Path, expected: list[NDArray[np.float32]]) -> None:
    with filled(path) as (executor, kv):
        spill, chunk = executor.kv_tiers.store.spill, kv.chunks(1)[0]
        assert spill is not None
        assert chunk.slot is not None
        flip(spill, chunk.slot.number * spill.slot_bytes + 777)
        with pytest.raises(SequenceError, match="are not what was written"):
            next_logits(executor, kv)
        kv.truncate(0)
        many(executor)
        assert np.array_equal(run(executor, kv, IDS[:TOKENS]), expected[0])


@pytest.mark.parametrize("first", [2, 5, 8, 11])
def test_row_13_a_drive_that_fills_up_ends_one_sequence_while_experts_are_read(
    path: Path, expected: list[NDArray[np.float32]], first: int
) -> None:
    try:
        with spilling(path, 3, slots=SLOTS, files=FailingFiles(first, FOR_GOOD, 28)) as executor:
            kv, other = executor.new_kv(TOKENS + 64), executor.new_kv(64)
            run(executor, other, IDS[:20])
            with pytest.raises(SequenceError, match=r"has no room|cannot be written|No space left"):
                assert np.array_equal(run(executor, kv, IDS[:TOKENS]), expected[0])
            few(executor)
            run(executor, other, IDS[20:21])
            assert other.length == 21
    except FlashError as error:  # the file could not be made: said before anything runs
        assert error.hint
        assert first <= 4


@pytest.mark.parametrize(("owner", "name"), [(Pool, "run"), (ThreadPoolExecutor, "submit"), (Future, "result")])
def test_row_19_an_interrupt_leaves_no_read_behind(
    path: Path, expected: list[NDArray[np.float32]], owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C where nobody handles it: an exception in the main thread when a pass begins, runs or ends."""
    called = getattr(owner, name)

    def interrupted(*arguments: object, **options: object) -> None:
        called(*arguments, **options)
        raise KeyboardInterrupt

    with filled(path) as (executor, kv):
        for _ in range(3):
            few(executor)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    run(executor, kv, IDS[TOKENS : TOKENS + 1])
            assert kv.length == TOKENS
            assert all_equal(next_logits(executor, kv), expected[1:])
            kv.truncate(TOKENS)
