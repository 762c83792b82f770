"""Chunks of KV caches: memory that sequences share until one of them writes to it, and copies of it on flash.

A chunk belongs to its owners, each of which lets it go once; the last one's letting go gives memory and flash back. A
chunk that is to be written to belongs to one owner alone and has no copy on flash. Its bytes are in RAM, on flash, or
in both. Knows nothing about what chunks hold, nor about which of them should be where.
"""

import logging
import threading
from collections import deque

import numpy as np
from numpy.typing import NDArray

from offload.closing import Closing
from offload.errors import FlashError
from offload.kv_spill import Slot, SpillFile
from offload.memory import reserved_bytes
from offload.pairs import Pairs

log = logging.getLogger("strata.kv")

# Of a ring: as much as a drive of 2 GB/s reads while a layer of 8 ms does without keys and values. Rings of 8 to 32 MiB
# were as fast for the 1B shape, half of 16384 tokens on flash; 4 MiB took 25% longer.
RING_BYTES = 16 << 20
RING_SLOTS = 8  # at least
KEPT_PIECES = 2  # that stay in RAM before parts of others do
CACHED_FOR_ONE = 3  # of the others
RANGES = 4  # that fit into a ring: one is attended to while others arrive

Bytes = NDArray[np.uint8]


def staging_slots(layers: int, chunk_bytes: int, whole: int, part: int = 0) -> int:
    """Chunks that passes have room for: `ring_slots` where so many pieces lie on flash in layers that are read `whole`.

    `part`: in layers of which tokens choose a part; they have one layer's room besides, which is the ring of passes
    over prompts, because those read them whole too.
    """
    if not part:
        return ring_slots(layers, chunk_bytes, whole)
    return max(part + max(ring_slots(layers, chunk_bytes, whole), 1), ring_slots(layers, chunk_bytes, part))


def ring_slots(layers: int, chunk_bytes: int, pieces: int) -> int:
    """Chunks of the ring to which layers with at most so many pieces on flash are read whole.

    Two layers', so that one is read while the other is computed, of a model of two layers one's: more would gain
    nothing. Of many pieces less will do, because they are gone through range by range.
    """
    return min(pieces * (2 if layers > 2 else 1), max(RING_BYTES // max(chunk_bytes, 1), RING_SLOTS))


def cached_chunks(cold: int, warm: int) -> int:
    """For how many of a layer's chunks there is room beside those in RAM, `warm`, to keep what tokens choose most of
    those on flash, `cold`: it holds more of what is needed than chunks do, old or new.
    """
    return min(cold // 2, CACHED_FOR_ONE * max(warm - KEPT_PIECES, 0))


class Chunk:
    """Bytes that begin on a page. `memory` is None while they are on flash alone, `slot` while in RAM alone."""

    __slots__ = ("address", "memory", "num_bytes", "owners", "saving", "slot")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.memory: Bytes | None = None
        self.address = 0  # of its memory
        self.slot: Slot | None = None
        self.owners = 1
        self.saving = False  # asked for, and not yet on flash


class ChunkStore(Closing):
    """All chunks of a process's sequences; with `spill` a thread beside writes them to flash."""

    def __init__(self, spill: SpillFile | None = None) -> None:
        self.spill = spill
        self.version = 0  # grows when bytes of any chunk move
        self.failure: FlashError | None = None  # why nothing can be written to flash any more
        self._ram_bytes = 0
        self._cold_bytes = 0
        self._copied = 0
        self._lock = threading.RLock()
        self._asked = threading.Condition(self._lock)
        self._saved = threading.Condition(self._lock)
        self._queue: deque[tuple[Chunk, Pairs | None]] = deque()
        self._closed = False
        self._writer: threading.Thread | None = None

    @property
    def ram_bytes(self) -> int:
        """Bytes of chunks that are in RAM."""
        return self._ram_bytes

    @property
    def cold_bytes(self) -> int:
        """Bytes of chunks that are on flash alone."""
        return self._cold_bytes

    @property
    def copied(self) -> int:
        """Chunks that were copied so far, because one of their owners wrote to them."""
        return self._copied

    @property
    def can_save(self) -> bool:
        """Whether there is flash, and nothing failed there."""
        return self.spill is not None and self.failure is None

    def new(self, num_bytes: int) -> Chunk:
        """A chunk of one owner; memory takes RAM when it is first written. MemoryError where there is none."""
        chunk = Chunk(num_bytes)
        self._take_memory(chunk, reserved_bytes(num_bytes, huge_pages=False))
        return chunk

    def replaced(self, chunk: Chunk) -> Chunk:
        """A new chunk of as many bytes for one of its owners, who lets it go."""
        made = self.new(chunk.num_bytes)
        self.drop(chunk)
        return made

    def share(self, chunk: Chunk) -> Chunk:
        """The same chunk, with one owner more."""
        with self._lock:
            chunk.owners += 1
        return chunk

    def drop(self, chunk: Chunk) -> None:
        """An owner lets go of it."""
        with self._lock:
            chunk.owners -= 1
            if chunk.owners == 0:
                if chunk.memory is None:
                    self._cold_bytes -= chunk.num_bytes
                self._forget_slot(chunk)
                self._forget_memory(chunk)

    def writable(self, chunk: Chunk) -> Chunk:
        """A chunk of the same bytes, in RAM, for one of its owners alone: it, or a copy for which it is let go.

        FlashError where it must be read and cannot.
        """
        self.bring(chunk)
        with self._lock:
            assert chunk.memory is not None, "it was brought"
            if chunk.owners == 1:
                self._forget_slot(chunk)
                return chunk
            memory = chunk.memory
        copy = self.new(chunk.num_bytes)
        assert copy.memory is not None, "new chunks are in RAM"
        np.copyto(copy.memory, memory)
        with self._lock:
            self._copied += 1
        self.drop(chunk)
        return copy

    def save(self, chunk: Chunk, pairs: Pairs | None = None) -> None:
        """Has it written to flash soon, as `pairs` if it may be read in part; it may be dropped or shared meanwhile."""
        with self._lock:
            if chunk.slot is not None or chunk.saving or not self.can_save or self._closed:
                return
            chunk.saving = True
            chunk.owners += 1  # so that nobody writes to it
            self._queue.append((chunk, pairs))
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_all, name="strata-kv-writer", daemon=True)
                self._writer.start()
            self._asked.notify()

    def evict(self, chunk: Chunk) -> None:
        """Leaves it on flash alone, once it is there. FlashError where that failed; it stays in RAM then."""
        self.save(chunk)
        with self._lock:
            self._saved.wait_for(lambda: not chunk.saving)
            if chunk.slot is None:
                raise self.failure or FlashError("a chunk of KV after its store was closed")
            if chunk.memory is not None:
                self._cold_bytes += chunk.num_bytes
            self._forget_memory(chunk)

    def bring(self, chunk: Chunk) -> None:
        """Has it in RAM again, and on flash as well; FlashError."""
        with self._lock:
            slot = chunk.slot
            if chunk.memory is not None:
                return
        assert self.spill is not None and slot is not None, "what is not in RAM is on flash"
        memory = reserved_bytes(chunk.num_bytes, huge_pages=False)
        self.spill.read(slot, memory)
        self._take_memory(chunk, memory)
        with self._lock:
            self._cold_bytes -= chunk.num_bytes

    def read(self, chunk: Chunk) -> Bytes:
        """Its bytes: its memory, or a copy of what is on flash; FlashError."""
        with self._lock:
            memory, slot = chunk.memory, chunk.slot
        if memory is not None:
            return memory
        assert self.spill is not None and slot is not None, "what is not in RAM is on flash"
        memory = reserved_bytes(chunk.num_bytes, huge_pages=False)
        self.spill.read(slot, memory)
        return memory

    def close(self) -> None:
        """Ends the writing, and the reads; what is on flash is lost. May be called twice."""
        with self._lock:
            self._closed = True
            self._asked.notify()
        if self._writer is not None:
            self._writer.join()
        if self.spill is not None:
            self.spill.close()

    def _take_memory(self, chunk: Chunk, memory: Bytes) -> None:
        with self._lock:
            chunk.memory, chunk.address = memory, memory.ctypes.data
            self._ram_bytes += chunk.num_bytes
            self.version += 1

    def _forget_slot(self, chunk: Chunk) -> None:
        if chunk.slot is not None and self.spill is not None:
            self.spill.free(chunk.slot)
        chunk.slot = None

    def _forget_memory(self, chunk: Chunk) -> None:
        if chunk.memory is not None:
            self._ram_bytes -= chunk.num_bytes
            self.version += 1
        chunk.memory, chunk.address = None, 0

    def _write_all(self) -> None:
        """The writer's life."""
        while (asked := self._next()) is not None:
            chunk, pairs = asked
            assert self.spill is not None and chunk.memory is not None, "asked for by `save`"
            slot, failure = None, self.failure
            if failure is None and chunk.owners > 1:  # else nobody needs it any more
                try:
                    slot = self.spill.write(chunk.memory, pairs)
                except FlashError as error:
                    failure = error
                    log.error("KV stays in RAM from now on: %s", error)
            with self._lock:
                chunk.slot, chunk.saving, self.failure = slot, False, failure
                self._saved.notify_all()
            self.drop(chunk)

    def _next(self) -> tuple[Chunk, Pairs | None] | None:
        with self._lock:
            while not self._queue and not self._closed:
                self._asked.wait()
            if not self._closed:
                return self._queue.popleft()
            for chunk, _ in self._queue:
                chunk.saving = False
            self._queue.clear()
            self._saved.notify_all()
            return None
