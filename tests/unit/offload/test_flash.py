"""Background reads: the right bytes from any place, the urgent first, each answered once, none that hangs for ever."""

import errno
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import gguf_source
from offload.errors import FlashError, StrataError
from offload.flash import BLOCK_BYTES, Extent, FlashReader, Priority, ReadMode
from offload.gguf_source import ByteSource

SIZE = 5 * BLOCK_BYTES + 123
DATA = np.random.default_rng(3).integers(0, 256, SIZE, np.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByteSource]:
    path = tmp_path_factory.mktemp("flash") / "file.bin"
    path.write_bytes(DATA.tobytes())
    file = ByteSource(path)
    yield file
    file.close()


class Answers:
    """What a reader said of extents, by their order."""

    def __init__(self, reader: FlashReader) -> None:
        self.reader = reader
        self.data: dict[int, bytes] = {}
        self.errors: dict[int, StrataError] = {}
        self.order: list[int] = []

    def ask(self, number: int, extent: Extent, priority: Priority = Priority.DEMAND):
        def consume(data: np.ndarray) -> None:
            assert number not in self.data
            self.order.append(number)
            self.data[number] = data.tobytes()

        def failed(error: StrataError) -> None:
            assert number not in self.errors
            self.errors[number] = error

        return self.reader.submit(extent, consume, failed, priority)


class Gate:
    """Reads that wait until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        read = gguf_source.positional_read

        def slow(descriptor: int, destination: memoryview, offset: int) -> int:
            self.entered.release()
            assert self.open.wait(30)
            return read(descriptor, destination, offset)

        monkeypatch.setattr(gguf_source, "positional_read", slow)


@settings(max_examples=30, deadline=None)
@given(
    mode=st.sampled_from(list(ReadMode)),
    extents=st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), min_size=1, max_size=12),
    depth=st.integers(1, 4),
)
def test_any_extents_are_read(source: ByteSource, mode: ReadMode, extents: list[tuple[int, int]], depth: int) -> None:
    wanted = [Extent(0, min(pair), max(pair) - min(pair)) for pair in extents]
    with FlashReader([source], most_bytes=SIZE, mode=mode, depth=depth) as reader:
        answers = Answers(reader)
        for number, extent in enumerate(wanted):
            answers.ask(number, extent)
        reader.drain()
        assert not answers.errors
        for number, extent in enumerate(wanted):
            assert answers.data[number] == DATA[extent.offset : extent.offset + extent.num_bytes].tobytes()
        assert reader.counts.reads == len(wanted)
        assert reader.counts.num_bytes == sum(extent.num_bytes for extent in wanted)


def test_the_urgent_come_first(source: ByteSource, monkeypatch: pytest.MonkeyPatch) -> None:
    with FlashReader([source], most_bytes=100, mode=ReadMode.BUFFERED, depth=1) as reader:
        gate, answers = Gate(monkeypatch), Answers(reader)
        answers.ask(0, Extent(0, 0, 10))
        assert gate.entered.acquire(timeout=30)
        later = answers.ask(1, Extent(0, 0, 10), Priority.PREFETCH)
        answers.ask(2, Extent(0, 0, 10), Priority.PREFETCH)
        answers.ask(3, Extent(0, 0, 10), Priority.AHEAD)
        answers.ask(4, Extent(0, 0, 10))
        reader.hurry(later)
        gate.open.set()
        reader.drain()
    assert answers.order == [0, 4, 1, 3, 2]


def test_a_read_that_has_not_begun_is_cancelled(source: ByteSource, monkeypatch: pytest.MonkeyPatch) -> None:
    with FlashReader([source], most_bytes=100, depth=1) as reader:
        gate, answers = Gate(monkeypatch), Answers(reader)
        first = answers.ask(0, Extent(0, 0, 10))
        assert gate.entered.acquire(timeout=30)
        second = answers.ask(1, Extent(0, 0, 10))
        assert reader.cancel(second)
        assert not reader.cancel(second)
        assert not reader.cancel(first), "it has begun"
        gate.open.set()
        reader.drain()
        assert answers.order == [0]
        assert reader.counts.cancelled == 1


def test_reads_that_wait_are_dropped_at_the_end(source: ByteSource, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FlashReader([source], most_bytes=100, depth=1)
    gate, answers = Gate(monkeypatch), Answers(reader)
    answers.ask(0, Extent(0, 0, 10))
    assert gate.entered.acquire(timeout=30)
    answers.ask(1, Extent(0, 0, 10))
    gate.open.set()
    reader.close()
    reader.close()
    assert answers.order[:1] == [0]
    with pytest.raises(FlashError, match="after the files were closed"):
        answers.ask(2, Extent(0, 0, 10))


def test_what_cannot_be_used_is_an_error(source: ByteSource) -> None:
    errors: list[StrataError] = []

    def consume(_: np.ndarray) -> None:
        raise ValueError("not these bytes")

    with FlashReader([source], most_bytes=100) as reader:
        reader.submit(Extent(0, 0, 10), consume, errors.append)
        reader.drain()
        answers = Answers(reader)
        answers.ask(0, Extent(0, 0, 10))
        reader.drain()
        assert answers.order == [0], "the thread goes on"
    assert "not these bytes" in str(errors[0])


def test_without_direct_reads_the_page_cache_does(
    source: ByteSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("offload.direct_file.os.open", refuse)
    with FlashReader([source], most_bytes=100) as reader:
        assert reader.mode is ReadMode.BUFFERED
        assert "no direct reads here" in caplog.text
        answers = Answers(reader)
        answers.ask(0, Extent(0, 50, 10))
        reader.drain()
        assert answers.data[0] == DATA[50:60].tobytes()


def test_idle_threads_cost_nothing(source: ByteSource) -> None:
    import time

    with FlashReader([source], most_bytes=100):
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.05
