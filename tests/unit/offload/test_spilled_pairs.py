"""Some pairs of a spill file's slots are read: what was written or an error, whatever a drive does meanwhile."""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.pair_reads import PAGE_BYTES, Calls
from offload import gguf_source, pair_reader
from offload.errors import FlashError, StrataError
from offload.flash import ReadMode
from offload.kv_spill import Slot, SpillFile
from offload.memory import reserved_bytes
from offload.pair_reader import RUN_BYTES
from offload.pairs import Pairs
from offload.spilled_pairs import PairReads
from tests.faults.test_row_11_spilled_kv import flip
from tests.support.failing_reads import FailingReads

ALIGNED, ODD, LARGE = Pairs(16, 8192, 4096), Pairs(40, 544, 1000), Pairs(2, RUN_BYTES, 4096)
SLOT_BYTES = 1 << 19
RUNS = [(0, 0, 3), (0, 7, 1), (1, 5, 2), (2, 14, 2)]
PREAD = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)

KEPT: list[object] = []  # functions that threads may still be in

pytestmark = pytest.mark.usefixtures("no_read_pauses")


@dataclass(slots=True)
class Written:
    """Three slots, what they hold, and memory to read them to."""

    spill: SpillFile
    slots: list[Slot]
    data: list[np.ndarray]
    memory: list[np.ndarray]
    copies: np.ndarray

    def read(
        self, runs: Sequence[tuple[int, int, int]] = RUNS, meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[int, StrataError] | None:
        assert self.spill.pairs is not None
        slots = [slot.paired for slot in self.slots if slot.paired is not None]
        places = np.array([memory.ctypes.data for memory in self.memory], np.int64)
        reads = PairReads(slots, np.array(runs, np.int64).reshape(-1, 3), places, self.copies, self)
        return self.spill.pairs.read(reads, meanwhile)

    def check(self, runs: Sequence[tuple[int, int, int]] = RUNS) -> None:
        """Memory holds what was read, and nothing else."""
        assert self.slots[0].paired is not None
        pairs = self.slots[0].paired.pairs
        for number, (data, memory) in enumerate(zip(self.data, self.memory, strict=True)):
            read = np.zeros(data.size, bool)
            for _, first, count in (run for run in runs if run[0] == number):
                read[first * pairs.first_bytes : (first + count) * pairs.first_bytes] = True
                seconds = pairs.seconds_start + first * pairs.second_bytes
                read[seconds : seconds + count * pairs.second_bytes] = True
            assert np.array_equal(memory[read], data[read])
            assert not memory[~read].any()
            memory[:] = 0


@contextmanager
def written(
    folder: Path, pairs: Pairs = ALIGNED, mode: ReadMode = ReadMode.DIRECT, deadline_s: float = 30.0
) -> Iterator[Written]:
    with SpillFile(folder, SLOT_BYTES, in_parts=True, mode=mode, deadline_s=deadline_s) as spill:
        num_bytes = -(-pairs.count * pairs.pair_bytes // PAGE_BYTES) * PAGE_BYTES
        data = [reserved_bytes(num_bytes, huge_pages=False) for _ in range(3)]
        for number, each in enumerate(data):
            each[:] = np.random.default_rng(number).integers(1, 256, num_bytes)
        slots = [spill.write(each, pairs) for each in data]
        memory = [np.zeros(num_bytes, np.uint8) for _ in range(3)]
        yield Written(spill, slots, data, memory, np.zeros((3, pairs.count), np.int64))


@pytest.mark.parametrize("mode", list(ReadMode))
@pytest.mark.parametrize("pairs", [ALIGNED, ODD])
@pytest.mark.parametrize("quickly", [True, False])
def test_pairs_are_read_where_they_belong(
    tmp_path: Path, pairs: Pairs, mode: ReadMode, quickly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with written(tmp_path, pairs, mode) as it:
        if not quickly:
            monkeypatch.setattr(gguf_source, "positional_read", FailingReads(0, 0))
        kept = np.zeros((2, pairs.pair_bytes), np.uint8)
        it.copies[0, [1, 7]] = [each.ctypes.data for each in kept]
        called: list[int] = []
        before = it.spill.read_bytes
        assert it.read(meanwhile=lambda: called.append(1)) is None
        assert called == [1]
        assert it.spill.read_bytes > before
        it.check()
        first = it.data[0][pairs.first_bytes :][: pairs.first_bytes]
        assert np.array_equal(kept[0, : pairs.first_bytes], first)
        assert it.read([]) is None
        it.check([])


def test_slots_of_pairs_are_read_whole_too(tmp_path: Path) -> None:
    with written(tmp_path) as it:
        for slot, data, memory in zip(it.slots, it.data, it.memory, strict=True):
            it.spill.read(slot, memory)
            assert np.array_equal(memory, data)


def test_runs_too_long_for_a_thread_are_read_another_way(tmp_path: Path) -> None:
    with written(tmp_path, LARGE) as it:
        runs = [(0, 0, 2), (2, 1, 1)]
        assert it.read(runs) is None
        it.check(runs)


def test_more_runs_than_a_pipe_holds_go_one_batch_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_reader, "MOST_JOBS", 2)
    with written(tmp_path) as it:
        for runs in (RUNS, [*RUNS, (1, 9, 1)]):
            assert it.read(runs) is None
            it.check(runs)


def test_row_17_no_memory_to_read_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(num_bytes: int) -> np.ndarray:
        raise MemoryError(f"{num_bytes} bytes")

    with written(tmp_path) as it:
        with monkeypatch.context() as patch:
            patch.setattr(pair_reader, "read_buffer", fails)
            failed = it.read()
        assert failed is not None
        assert "no memory" in str(failed[1])
        it.check([])
        assert it.read() is None
        it.check()


def test_only_files_for_pairs_take_them(tmp_path: Path) -> None:
    with SpillFile(tmp_path, SLOT_BYTES) as spill, pytest.raises(ValueError, match="not for pairs"):
        spill.write(reserved_bytes(SLOT_BYTES, huge_pages=False), ALIGNED)


@pytest.mark.parametrize("mode", list(ReadMode))
def test_row_14_a_flipped_bit_is_never_used(tmp_path: Path, mode: ReadMode) -> None:
    with written(tmp_path, mode=mode) as it:
        flip(it.spill, it.slots[1].number * SLOT_BYTES + 5 * ALIGNED.pair_bytes + 4321)
        failed = it.read()
        assert failed is not None
        assert failed[0] == 1
        assert "not what was written" in str(failed[1])
        assert not it.memory[1].any()
        elsewhere = [run for run in RUNS if run[0] != 1]
        assert it.read(elsewhere) is None
        it.check(elsewhere)


def test_row_10_a_file_that_was_cut_is_noticed(tmp_path: Path) -> None:
    with written(tmp_path) as it:
        os.ftruncate(it.spill._descriptor, PAGE_BYTES)
        failed = it.read()
        assert failed is not None
        assert "the file ends" in str(failed[1])


@pytest.mark.parametrize("first", [1, 3])
def test_row_11_a_read_that_fails_once_is_made_again(
    tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with written(tmp_path) as it:
        monkeypatch.setattr(gguf_source, "positional_read", FailingReads(first, 1))
        assert it.read() is None
        it.check()
        monkeypatch.setattr(gguf_source, "positional_read", FailingReads(first, 10**6))
        failed = it.read()
        assert failed is not None
        assert "injected" in str(failed[1])


def test_row_11_a_quick_read_that_fails_is_made_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def pread(descriptor: int, memory: int, num_bytes: int, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1:
            ctypes.set_errno(errno.EIO)
            return -1
        data = os.pread(descriptor, PAGE_BYTES if len(calls) == 2 else num_bytes, offset)  # the second is short
        ctypes.memmove(memory, data, len(data))
        return len(data)

    with written(tmp_path, mode=ReadMode.BUFFERED) as it, reading_with(it, pread):
        assert it.read() is None
        assert len(calls) == len(RUNS)
        it.check()


def test_row_12_reads_that_hang_are_given_up(tmp_path: Path) -> None:
    is_open = threading.Event()

    def pread(descriptor: int, memory: int, num_bytes: int, offset: int) -> int:
        assert is_open.wait(30)
        return -1

    with written(tmp_path, deadline_s=0.2) as it, reading_with(it, pread):
        failed = it.read()
        assert failed is not None
        assert "more than 0.2 s" in str(failed[1])
        it.check([])
        assert it.read() is None, "by other threads"
        it.check()
        is_open.set()


def test_row_19_an_interrupted_read_is_waited_for(tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with written(tmp_path) as it:
        with pytest.raises(KeyboardInterrupt):
            it.read(meanwhile=interrupted)
        assert it.spill.pairs is not None
        it.spill.pairs.drain()
        it.check()
        assert it.read() is None
        it.check()


def test_nothing_is_read_of_a_closed_file(tmp_path: Path) -> None:
    with written(tmp_path) as it:
        assert it.read() is None
        it.spill.close()
        failed = it.read()
        assert failed is not None
        assert isinstance(failed[1], FlashError)


@contextmanager
def reading_with(it: Written, pread: Callable[[int, int, int, int], int]) -> Iterator[None]:
    """Quick reads by a function in place of the system's."""
    assert it.spill.pairs is not None
    assert it.spill.pairs._quick is not None
    function = PREAD(pread)
    KEPT.append(function)
    it.spill.pairs._quick._calls[Calls.PREAD] = ctypes.cast(function, ctypes.c_void_p).value or 0
    yield
