"""Reads of model files in the background: several at a time, the urgent ones first, past the page cache where it can.

Each read fills memory of the thread that makes it, in huge pages, and hands the bytes to a function on that thread.
Knows nothing about what is read. Short reads go on, EIO is tried again (`gguf_source.positional_read` is the seam for
faults), and a read that takes longer than the deadline fails while its thread still hangs: what such a read brings
later is thrown away. Invariant: for every read exactly one of `consume` and `failed` is called, or neither when it was
cancelled before it began.
"""

import errno
import heapq
import itertools
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

from offload import gguf_source
from offload.closing import Closing
from offload.errors import FlashError, StrataError
from offload.gguf_source import ByteSource
from offload.memory import HUGE_PAGE_BYTES, read_buffer

log = logging.getLogger("strata.flash")

BLOCK_BYTES = 4096
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


class DirectFile:
    """A second descriptor of an open file, for reads of whole blocks that leave the page cache alone."""

    def __init__(self, source: ByteSource) -> None:
        """OSError where the file system cannot; FlashError if another file has taken the path."""
        self.source = source
        self._descriptor = os.open(source.path, os.O_RDONLY | os.O_DIRECT)
        opened = os.fstat(self._descriptor)
        if (opened.st_dev, opened.st_ino, opened.st_size, opened.st_mtime_ns) != source.identity:
            self.close()
            raise FlashError(f"{source.path}: the file was replaced while in use", hint="start again")
        try:
            with mmap.mmap(-1, BLOCK_BYTES) as block, memoryview(block) as view:
                gguf_source.positional_read(self._descriptor, view, 0)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._descriptor)

    def read_into(self, memory: memoryview, offset: int, needed: int) -> None:
        """Fills at least the first `needed` bytes of `memory`, which begins on a page, from a multiple of a block.

        FlashError if the drive fails for good, or the file ends early or changed.
        """
        done, failures = 0, 0
        while done < needed:
            try:
                count = gguf_source.positional_read(self._descriptor, memory[done:], offset + done)
                if count == 0:
                    self.source.check_identity()
                    end = f"the file ends at byte {offset + done}, {needed - done} more were expected"
                    raise FlashError(f"{self.source.path}: {end}", hint="download the file again")
                if done + count < needed and count < BLOCK_BYTES:
                    raise OSError(errno.EIO, "a read of less than a block")
            except OSError as error:
                failures += 1
                if error.errno != errno.EIO or failures > gguf_source.EIO_RETRIES:
                    raise FlashError(
                        f"{self.source.path}: reading at byte {offset + done} failed: {error.strerror or error}",
                        hint="check the drive and its cable (kernel log, SMART), then start again",
                    ) from error
                time.sleep(gguf_source.EIO_PAUSE_S * 2 ** (failures - 1))
                continue
            done += count
            if done < needed:
                done -= done % BLOCK_BYTES
        self.source.check_identity()


Consume = Callable[[NDArray[np.uint8]], None]
Failed = Callable[[StrataError], None]


@dataclass(order=True, slots=True)
class Read:
    """A read that was asked for."""

    priority: Priority
    number: int
    extent: Extent = field(compare=False)
    consume: Consume = field(compare=False)
    failed: Failed = field(compare=False)
    started_s: float = field(default=0.0, compare=False)  # 0: not yet
    given_up: bool = field(default=False, compare=False)
    over: bool = field(default=False, compare=False)  # done, failed or cancelled


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
        self._numbers = itertools.count()
        self._waiting: list[Read] = []
        self._active: list[Read] = []
        lock = threading.Lock()
        self._asked = threading.Condition(lock)  # threads that read wait for it
        self._changed = threading.Condition(lock)
        self._closed = False
        self._busy_since = 0.0
        names = [(self._read_all, f"strata-flash-{index}") for index in range(depth)]
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in (*names, (self._watch, "strata-flash-watch"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that reads take."""
        return -(-self._memory_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES * (len(self._threads) - 1)

    def submit(self, extent: Extent, consume: Consume, failed: Failed, priority: Priority = Priority.DEMAND) -> Read:
        """Asks for a read; `consume` gets the bytes, which are only valid during the call, or `failed` why not."""
        read = Read(priority, next(self._numbers), extent, consume, failed)
        with self._changed:
            if self._closed:
                raise FlashError("a read after the files were closed")
            heapq.heappush(self._waiting, read)
            self._asked.notify()
        return read

    def cancel(self, read: Read) -> bool:
        """Whether the read had not begun; then it never will."""
        with self._changed:
            if read.over or read.started_s:
                return False
            read.over = True
            self._waiting.remove(read)
            heapq.heapify(self._waiting)
            self.counts.cancelled += 1
            return True

    def hurry(self, read: Read) -> None:
        """Somebody waits for this read now."""
        with self._changed:
            if not read.over and not read.started_s and read.priority is not Priority.DEMAND:
                read.priority = Priority.DEMAND
                heapq.heapify(self._waiting)

    def drain(self) -> None:
        """Returns when nothing is asked for any more, or what is left hangs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and all(read.over for read in self._active))

    def close(self) -> None:
        """Cancels what has not begun and ends the threads, except those that hang; may be called twice."""
        with self._changed:
            self._closed = True
            for read in self._waiting:
                read.over = True
            self._waiting.clear()
            self._asked.notify_all()
            self._changed.notify_all()
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

    def _read_all(self) -> None:
        """A thread's life."""
        array = read_buffer(self._memory_bytes)
        view = array.data
        while (read := self._next()) is not None:
            error: StrataError | None = None
            try:
                data = self._fill(view, array, read.extent)
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

    def _fill(self, view: memoryview, array: NDArray[np.uint8], extent: Extent) -> NDArray[np.uint8]:
        if not self._direct:
            self._sources[extent.source].read_into(view[: extent.num_bytes], extent.offset)
            return array[: extent.num_bytes]
        skipped = extent.offset % BLOCK_BYTES
        needed = skipped + extent.num_bytes
        asked = -(-needed // BLOCK_BYTES) * BLOCK_BYTES
        self._direct[extent.source].read_into(view[:asked], extent.offset - skipped, needed)
        return array[skipped:needed]

    def _next(self) -> Read | None:
        with self._changed:
            self._asked.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            read = heapq.heappop(self._waiting)
            read.started_s = time.monotonic()
            if not self._active:
                self._busy_since = read.started_s
                self._changed.notify_all()  # the watch
            self._active.append(read)
            return read

    def _not_given_up(self, read: Read) -> bool:
        """If so, nobody will give it up from now on."""
        with self._changed:
            read.started_s = float("inf")
            return not read.given_up

    def _end(self, read: Read) -> None:
        with self._changed:
            read.over = True
            self._active.remove(read)
            self.counts.reads += 1
            self.counts.num_bytes += read.extent.num_bytes
            if not self._active:
                self.counts.busy_s += time.monotonic() - self._busy_since
            self._changed.notify_all()

    def _watch(self) -> None:
        """Gives up reads that take longer than the deadline."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._active or self._closed)
                if self._closed:
                    return
                now = time.monotonic()
                late = [read for read in self._active if not read.given_up and now - read.started_s > self._deadline_s]
                for read in late:
                    read.given_up = True
                if not late:
                    self._changed.wait(self._deadline_s / 4)
            for read in late:
                extent, path = read.extent, self._sources[read.extent.source].path
                read.failed(
                    FlashError(
                        f"{path}: reading {extent.num_bytes} bytes at byte {extent.offset} "
                        f"has taken more than {self._deadline_s:g} s",
                        hint="check the drive (kernel log, SMART); a network drive may have lost its server",
                    )
                )
                with self._changed:
                    read.over = True
                    self._changed.notify_all()
