"""A file on flash for the KV chunks of one process that RAM has no room for: slots, written once and read often.

The file has no name any more once it is open, so that nothing of it outlives the process, however that ends. Space is
reserved before anything is written to it. Every slot's checksum is kept in RAM and compared at every read; what differs
is read once more. Knows nothing about what chunks hold or who needs them.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from offload import gguf_source
from offload.closing import Closing
from offload.errors import FlashError, StrataError
from offload.flash import DEADLINE_S, Extent, FlashReader, Priority, Read, ReadMode
from offload.gguf_source import ByteSource
from offload.store_files import BLOCK_BYTES, FILES, Files

log = logging.getLogger("strata.kv")

GROWTH_BYTES = 64 << 20  # reserved at a time
FREE_BYTES = 256 << 20  # of the drive that are left to others
PARTS_DEPTH = 16  # reads of parts at a time: 8 KiB come at 548 MB/s so, at 340 MB/s with 4 (virtio disk)

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Slot:
    """What lies in a part of the file: its number, bytes and checksum, and one for each of the drive's blocks, if it is
    read in parts.
    """

    number: int
    num_bytes: int
    checksum: int
    block_checksums: tuple[int, ...] = field(default=(), compare=False)


class SpillFile(Closing):
    """Slots of `slot_bytes`, whole blocks of the drive, in a file in `folder`; any thread may write and read.

    `in_parts`: parts of slots are read too, for which each of the drive's blocks has a checksum of its own.
    """

    def __init__(
        self,
        folder: Path,
        slot_bytes: int,
        *,
        in_parts: bool = False,
        files: Files = FILES,
        mode: ReadMode = ReadMode.DIRECT,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """FlashError if the file cannot be made; ValueError for slots that are not whole blocks."""
        if slot_bytes < 1 or slot_bytes % BLOCK_BYTES:
            raise ValueError(f"slots of {slot_bytes} bytes are not whole blocks of {BLOCK_BYTES}")
        self.slot_bytes = slot_bytes
        self._files = files
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._slots = 0
        self._path = folder / f"kv-{os.getpid()}-{id(self):x}.spill"
        try:
            files.make_folder(folder)
            self._descriptor = files.open(self._path, empty=True)
        except OSError as error:
            raise self._error("cannot be made", error) from error
        try:
            self._source = ByteSource(self._path, changes=True)
            self._reader = FlashReader([self._source], most_bytes=0, mode=mode, deadline_s=deadline_s)
            self._parts = (
                FlashReader([self._source], most_bytes=0, mode=mode, depth=PARTS_DEPTH, deadline_s=deadline_s)
                if in_parts
                else None
            )
            files.remove(self._path)
            self._set_direct(mode)
        except (OSError, FlashError) as error:
            os.close(self._descriptor)
            raise error if isinstance(error, FlashError) else self._error("cannot be made", error) from error

    @property
    def num_bytes(self) -> int:
        """Bytes of the slots in use."""
        with self._lock:
            return (self._slots - len(self._free)) * self.slot_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes that were read so far."""
        return sum(reader.counts.num_bytes for reader in self._readers)

    @property
    def busy_s(self) -> float:
        """Seconds during which something was read."""
        return sum(reader.counts.busy_s for reader in self._readers)

    def write(self, data: Bytes) -> Slot:
        """Puts `data`, which begins on a page and is whole blocks, in a free slot. FlashError; then none is taken."""
        number = self._take()
        try:
            self._write(data, number * self.slot_bytes)
        except OSError as error:
            self._give(number)
            raise self._error("cannot be written", error) from error
        blocks = () if self._parts is None else tuple(_block_checksums(data))
        return Slot(number, data.nbytes, xxhash.xxh3_64_intdigest(data.data), blocks)

    def free(self, slot: Slot) -> None:
        """The slot's bytes are not needed any more."""
        self._give(slot.number)

    def submit(
        self,
        slot: Slot,
        memory: Bytes,
        done: Callable[[], None],
        failed: Callable[[StrataError], None],
        priority: Priority = Priority.DEMAND,
    ) -> None:
        """Brings a slot's bytes to `memory`, which begins on a page, then calls `done`, or `failed`, on another thread.

        After a failure `memory` may still be written to: by a read that hung.
        """
        extent = Extent(0, slot.number * self.slot_bytes, slot.num_bytes)

        def is_right(data: Bytes) -> bool:
            return bool(xxhash.xxh3_64_intdigest(data.data) == slot.checksum)

        self._submit(extent, is_right, memory, done, failed, priority)

    def submit_parts(
        self,
        slot: Slot,
        ranges: Sequence[tuple[int, int]],
        memory: Bytes,
        done: Callable[[], None],
        failed: Callable[[StrataError], None],
    ) -> None:
        """As `submit` for parts of a slot, whole blocks from a first byte to an end each, to their places in `memory`,
        which has room for all of it. ValueError for a file that is not read in parts.
        """
        extent = Extent(0, slot.number * self.slot_bytes, slot.num_bytes)

        def is_right(data: Bytes) -> bool:
            view, sums, sum_of = data.data, slot.block_checksums, xxhash.xxh3_64_intdigest
            return all(
                sum_of(view[start : start + BLOCK_BYTES]) == sums[start // BLOCK_BYTES]
                for first, end in ranges
                for start in range(first, end, BLOCK_BYTES)
            )

        self._submit(extent, is_right, memory, done, failed, Priority.DEMAND, ranges)

    def _submit(
        self,
        extent: Extent,
        is_right: Callable[[Bytes], bool],
        memory: Bytes,
        done: Callable[[], None],
        failed: Callable[[StrataError], None],
        priority: Priority,
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        reader = self._reader if ranges is None else self._parts
        if reader is None:
            raise ValueError("a spill file that is not for reads of parts")

        def check(data: Bytes, *, again: bool) -> None:
            if is_right(data):
                done()
            elif again:
                where = f"{extent.num_bytes} bytes at byte {extent.offset}"
                failed(FlashError(f"{self._path}: {where} are not what was written", hint="check the drive (SMART)"))
            else:
                log.warning("%s: byte %d: wrong checksum; reading it again", self._path, extent.offset)
                read(again=True)

        def read(*, again: bool) -> None:
            asked = Read(priority, extent, lambda data: check(data, again=again), failed, memory, ranges)
            reader.submit_all([asked])

        read(again=False)

    def read(self, slot: Slot, memory: Bytes) -> None:
        """As `submit`, and waits for it; FlashError."""
        over = threading.Event()
        errors: list[StrataError] = []

        def failed(error: StrataError) -> None:
            errors.append(error)
            over.set()

        self.submit(slot, memory, over.set, failed)
        over.wait()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Ends the reads and gives the space back; may be called twice."""
        if self._source.closed:
            return
        for reader in self._readers:
            reader.close()
        self._source.close()
        os.close(self._descriptor)

    @property
    def _readers(self) -> list[FlashReader]:
        return [self._reader] if self._parts is None else [self._reader, self._parts]

    def _set_direct(self, mode: ReadMode) -> None:
        try:
            self._files.set_direct(self._descriptor, direct=mode is ReadMode.DIRECT)
        except OSError as error:
            log.warning("%s: no direct writes here (%s); writing through the page cache", self._path, error)

    def _take(self) -> int:
        """A free slot whose space is reserved; FlashError where the drive has none."""
        with self._lock:
            if not self._free:
                more = max(GROWTH_BYTES // self.slot_bytes, 1)
                try:
                    if self._files.free_bytes(self._path.parent) < more * self.slot_bytes + FREE_BYTES:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._files.reserve(self._descriptor, (self._slots + more) * self.slot_bytes)
                except OSError as error:
                    raise self._error("has no room", error) from error
                self._free.extend(range(self._slots + more - 1, self._slots - 1, -1))
                self._slots += more
            return self._free.pop()

    def _give(self, number: int) -> None:
        with self._lock:
            self._free.append(number)

    def _write(self, data: Bytes, offset: int) -> None:
        """All of `data`; EIO is tried again a few times."""
        view, done, failures = data.data, 0, 0
        while done < len(view):
            try:
                done += self._files.write(self._descriptor, view[done:], offset + done)
            except OSError as error:
                failures += 1
                if error.errno != errno.EIO or failures > gguf_source.EIO_RETRIES:
                    raise
                time.sleep(gguf_source.EIO_PAUSE_S * 2 ** (failures - 1))

    def _error(self, what: str, error: OSError) -> FlashError:
        return FlashError(
            f"the spill file {self._path} {what}: {error.strerror or error}",
            hint="free space on the drive, or run with a shorter context or a smaller KV type",
        )


def _block_checksums(data: Bytes) -> Iterator[int]:
    """Of each of the drive's blocks."""
    view = data.data
    for start in range(0, data.nbytes, BLOCK_BYTES):
        yield xxhash.xxh3_64_intdigest(view[start : start + BLOCK_BYTES])
