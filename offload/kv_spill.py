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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from offload import gguf_source
from offload.closing import Closing
from offload.errors import FlashError, StrataError
from offload.flash import DEADLINE_S, Extent, FlashReader, Priority, Read, ReadMode
from offload.gguf_source import ByteSource
from offload.memory import reserved_bytes
from offload.pairs import Pairs
from offload.store_files import BLOCK_BYTES, FILES, Files

if TYPE_CHECKING:
    from offload.spilled_pairs import PairedSlot, SpilledPairs

log = logging.getLogger("strata.kv")

GROWTH_BYTES = 64 << 20  # reserved at a time
FREE_BYTES = 256 << 20  # of the drive that are left to others

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Slot:
    """What lies in a part of the file: its number, bytes and checksum. `paired`: as what it may be read in part."""

    number: int
    num_bytes: int
    checksum: int
    paired: "PairedSlot | None" = field(default=None, compare=False)


class SpillFile(Closing):
    """Slots of `slot_bytes`, whole blocks of the drive, in a file in `folder`; any thread may write and read.

    `in_parts`: slots may be written as pairs, some of which may be read then.
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
            most_bytes = slot_bytes if in_parts else 0
            self._reader = FlashReader([self._source], most_bytes=most_bytes, mode=mode, deadline_s=deadline_s)
            self.pairs = self._pairs(deadline_s) if in_parts else None
            self._together = reserved_bytes(slot_bytes, huge_pages=False)  # what is being written as pairs
            self._writing = threading.Lock()
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
        return self._reader.counts.num_bytes + (0 if self.pairs is None else self.pairs.num_bytes)

    @property
    def busy_s(self) -> float:
        """Seconds during which something was read."""
        return self._reader.counts.busy_s + (0.0 if self.pairs is None else self.pairs.busy_s)

    def write(self, data: Bytes, pairs: Pairs | None = None) -> Slot:
        """Puts `data`, which begins on a page and is whole blocks, in a free slot. FlashError; then none is taken.

        `pairs`: as what, if some of it may be read alone: for a file `in_parts`, else ValueError.
        """
        if pairs is None:
            return self._put(data)
        if self.pairs is None:
            raise ValueError("a spill file that is not for pairs")
        with self._writing:
            together = self._together[: data.nbytes]
            pairs.put_together(data, together)
            slot = self._put(together)
            return replace(slot, paired=self.pairs.slot(slot.number, slot.number * self.slot_bytes, pairs, together))

    def _put(self, data: Bytes) -> Slot:
        """Bytes as they shall lie in the file."""
        number = self._take()
        try:
            self._write(data, number * self.slot_bytes)
        except OSError as error:
            self._give(number)
            raise self._error("cannot be written", error) from error
        return Slot(number, data.nbytes, xxhash.xxh3_64_intdigest(data.data))

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
        paired = slot.paired

        def is_right(data: Bytes) -> bool:
            return bool(xxhash.xxh3_64_intdigest(data.data) == slot.checksum)

        def take(data: Bytes) -> None:
            if paired is not None:
                paired.pairs.take_apart(data, memory)
            done()

        into = memory if paired is None else None
        self._submit(slot.number * self.slot_bytes, slot.num_bytes, is_right, take, failed, priority, into)

    def _submit(
        self,
        offset: int,
        num_bytes: int,
        is_right: Callable[[Bytes], bool],
        take: Callable[[Bytes], None],
        failed: Callable[[StrataError], None],
        priority: Priority = Priority.DEMAND,
        into: Bytes | None = None,
    ) -> None:
        """Reads `into` memory, or else to some that is valid during `take`, which is called once all is right."""

        def check(data: Bytes, *, again: bool) -> None:
            if is_right(data):
                take(data)
            elif again:
                where = f"{num_bytes} bytes at byte {offset}"
                failed(FlashError(f"{self._path}: {where} are not what was written", hint="check the drive (SMART)"))
            else:
                log.warning("%s: byte %d: wrong checksum; reading it again", self._path, offset)
                read(again=True)

        def read(*, again: bool) -> None:
            extent = Extent(0, offset, num_bytes)
            self._reader.submit_all([Read(priority, extent, lambda data: check(data, again=again), failed, into)])

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
        self._reader.close()
        if self.pairs is not None:
            self.pairs.close()
        self._source.close()
        os.close(self._descriptor)

    def _pairs(self, deadline_s: float) -> "SpilledPairs":
        from offload.spilled_pairs import SpilledPairs  # noqa: PLC0415 - brings llvmlite and numba

        direct = self._reader.mode is ReadMode.DIRECT
        return SpilledPairs(self._path, self._submit, direct=direct, deadline_s=deadline_s)

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
