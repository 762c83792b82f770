"""Reads of model files in the background: several at a time, the urgent ones first, past the page cache where it can.

Each read fills memory of the thread that makes it, in huge pages, and hands the bytes to a function on that thread.
Knows nothing about what is read. A read that takes longer than the deadline fails while its thread still hangs: what
such a read brings later is thrown away. Invariant: for every read exactly one of `consume` and `failed` is called, or
neither when it was cancelled before it began.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

from offload.closing import Closing
from offload.direct_file import BLOCK_BYTES, DirectFile
from offload.errors import FlashError, StrataError
from offload.gguf_source import ByteSource
from offload.memory import HUGE_PAGE_BYTES, read_buffer

log = logging.getLogger("strata.flash")

DEPTH = 4  # reads at a time
READ_BYTES = HUGE_PAGE_BYTES - 2 * BLOCK_BYTES  # that one read should bring at most: a huge page holds it
DEADLINE_S = 30.0


class ReadMode(StrEnum):
    """Past the page cache, or through it."""

    DIRECT = "direct"
    BUFFERED = "buffered"


class Priority(IntEnum):
    """Who waits for a read: a step that cannot go on, a step that soon will, or perhaps nobody."""

    DEMAND = 0
    AHEAD = 1
    PREFETCH = 2


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of the file with this index among a reader's."""

    source: int
    offset: int
    num_bytes: int


Consume = Callable[[NDArray[np.uint8]], None]
Failed = Callable[[StrataError], None]


@dataclass(eq=False, slots=True)
class Read:
    """A read to be asked for: `consume` gets the bytes, which are only valid during the call, or `failed` why not.

    `into`: memory for the bytes in place of the reading thread's own, whole blocks that begin on a page; the extent
    must begin with a block.
    """

    priority: Priority
    extent: Extent
    consume: Consume
    failed: Failed
    into: NDArray[np.uint8] | None = None
    started_s: float = 0.0  # 0: not yet
    given_up: bool = False
    over: bool = False  # done, failed or cancelled


@dataclass(slots=True)
class ReadCounts:
    """What a reader has done."""

    reads: int = 0
    num_bytes: int = 0
    cancelled: int = 0
    busy_s: float = 0.0  # while at least one read was under way


class FlashReader(Closing):
    """Reads extents of `sources` on `depth` threads; `most_bytes` is the longest extent."""

    def __init__(
        self,
        sources: Sequence[ByteSource],
        *,
        most_bytes: int,
        mode: ReadMode = ReadMode.DIRECT,
        depth: int = DEPTH,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.counts = ReadCounts()
        self.mode = mode
        self._sources = tuple(sources)
        self._direct = self._opened() if mode is ReadMode.DIRECT else ()
        self._memory_bytes = most_bytes + 2 * BLOCK_BYTES  # an extent may begin and end within a block
        self._deadline_s = deadline_s
        self._waiting: dict[Priority, deque[Read]] = {priority: deque() for priority in Priority}  # urgent ones first
        self._num_waiting = 0
        self._active: list[Read] = []
        lock = self._lock = threading.Lock()
        self._asked = threading.Condition(lock)  # threads that read wait for it
        self._idle = threading.Condition(lock)  # `drain` does
        self._ending = threading.Condition(lock)  # the watch does
        self._closed = False
        self._busy_since = 0.0
        self._threads = [
            threading.Thread(target=self._read_all, args=(memory,), name=f"strata-flash-{index}", daemon=True)
            for index, memory in enumerate(self._buffers(depth))
        ]
        self._threads.append(threading.Thread(target=self._watch, name="strata-flash-watch", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that reads take."""
        return -(-self._memory_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES * (len(self._threads) - 1)

    def submit(self, extent: Extent, consume: Consume, failed: Failed, priority: Priority = Priority.DEMAND) -> Read:
        """Asks for a read, see `Read`."""
        read = Read(priority, extent, consume, failed)
        self.submit_all([read])
        return read

    def submit_all(self, reads: Sequence[Read]) -> None:
        """Asks for reads, which are made in this order where they are equally urgent."""
        with self._lock:
            if self._closed:
                raise FlashError("a read after the files were closed")
            for read in reads:
                self._waiting[read.priority].append(read)
            self._num_waiting += len(reads)
            self._asked.notify(len(reads))

    def cancel(self, read: Read) -> bool:
        """Whether the read had not begun; then it never will."""
        with self._lock:
            if read.over or read.started_s:
                return False
            read.over = True
            self._waiting[read.priority].remove(read)
            self._num_waiting -= 1
            self.counts.cancelled += 1
            return True

    def hurry(self, read: Read) -> None:
        """Somebody waits for this read now: it comes after those that somebody waits for already."""
        with self._lock:
            if not read.over and not read.started_s and read.priority is not Priority.DEMAND:
                self._waiting[read.priority].remove(read)
                read.priority = Priority.DEMAND
                self._waiting[Priority.DEMAND].append(read)

    def drain(self) -> None:
        """Returns when nothing is asked for any more, or what is left hangs."""
        with self._lock:
            self._idle.wait_for(self._is_idle)

    def close(self) -> None:
        """Cancels what has not begun and ends the threads, except those that hang; may be called twice."""
        with self._lock:
            self._closed = True
            for waiting in self._waiting.values():
                for read in waiting:
                    read.over = True
                waiting.clear()
            self._num_waiting = 0
            self._asked.notify_all()
            self._idle.notify_all()
            self._ending.notify_all()
        stuck = any(read.given_up for read in self._active)
        for thread in self._threads:
            if thread is not threading.current_thread() and not stuck:
                thread.join()
        if not stuck:
            for file in self._direct:
                file.close()
            self._direct = ()

    def _opened(self) -> tuple[DirectFile, ...]:
        files: list[DirectFile] = []
        try:
            files.extend(DirectFile(source) for source in self._sources)
        except (OSError, AttributeError) as error:
            log.warning("%s: no direct reads here (%s); reading through the page cache", self._sources[0].path, error)
            for file in files:
                file.close()
            self.mode = ReadMode.BUFFERED
            return ()
        return tuple(files)

    def _buffers(self, count: int) -> list[NDArray[np.uint8]]:
        try:
            return [read_buffer(self._memory_bytes) for _ in range(count)]
        except MemoryError as error:
            for file in self._direct:
                file.close()
            size = f"{count} times {self._memory_bytes >> 10} KiB"
            raise FlashError(f"{self._sources[0].path}: there is no memory to read to, {size}") from error

    def _read_all(self, array: NDArray[np.uint8]) -> None:
        """A thread's life; `array` is what it reads to."""
        view = array.data
        while (read := self._next()) is not None:
            error: StrataError | None = None
            try:
                place = (view, array) if read.into is None else (read.into.data, read.into)
                data = self._fill(*place, read)
                if self._not_given_up(read):
                    read.consume(data)
            except StrataError as failure:
                error = failure
            except Exception as failure:  # noqa: BLE001 - handed on by `failed`
                error = FlashError(f"what was read could not be used: {failure}")
                error.__cause__ = failure
            if error is not None and self._not_given_up(read):
                read.failed(error)
            self._end(read)

    def _fill(self, view: memoryview, array: NDArray[np.uint8], read: Read) -> NDArray[np.uint8]:
        extent = read.extent
        if not self._direct:
            self._sources[extent.source].read_into(view[: extent.num_bytes], extent.offset)
            return array[: extent.num_bytes]
        skipped = extent.offset % BLOCK_BYTES
        needed = skipped + extent.num_bytes
        asked = -(-needed // BLOCK_BYTES) * BLOCK_BYTES
        self._direct[extent.source].read_into(view[:asked], extent.offset - skipped, needed)
        return array[skipped:needed]

    def _next(self) -> Read | None:
        with self._lock:
            while not self._num_waiting:
                if self._closed:
                    return None
                self._asked.wait()
            read = next(waiting for waiting in self._waiting.values() if waiting).popleft()
            self._num_waiting -= 1
            read.started_s = time.monotonic()
            if not self._active:
                self._busy_since = read.started_s
            self._active.append(read)
            return read

    def _not_given_up(self, read: Read) -> bool:
        """If so, nobody will give it up from now on."""
        with self._lock:
            read.started_s = float("inf")
            return not read.given_up

    def _end(self, read: Read) -> None:
        with self._lock:
            read.over = True
            self._active.remove(read)
            self.counts.reads += 1
            self.counts.num_bytes += read.extent.num_bytes
            if not self._active:
                self.counts.busy_s += time.monotonic() - self._busy_since
            if self._is_idle():
                self._idle.notify_all()

    def _is_idle(self) -> bool:
        """Nothing is asked for any more, or what is left hangs."""
        return not self._num_waiting and all(read.over for read in self._active)

    def _watch(self) -> None:
        """Gives up reads that take longer than the deadline."""
        while True:
            with self._lock:
                if self._closed:
                    return
                now = time.monotonic()
                late = [read for read in self._active if not read.given_up and now - read.started_s > self._deadline_s]
                for read in late:
                    read.given_up = True
                if not late:
                    self._ending.wait(self._deadline_s / 4)
            for read in late:
                extent, path = read.extent, self._sources[read.extent.source].path
                read.failed(
                    FlashError(
                        f"{path}: reading {extent.num_bytes} bytes at byte {extent.offset} "
                        f"has taken more than {self._deadline_s:g} s",
                        hint="check the drive (kernel log, SMART); a network drive may have lost its server",
                    )
                )
                with self._lock:
                    read.over = True
                    self._idle.notify_all()
