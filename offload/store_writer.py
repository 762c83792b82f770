"""Builds a store: bundles in any order into `NAME.partial`, which becomes `NAME` when all of them are on the drive.

What was finished is kept in a journal, so that a build that was killed goes on where it was; nothing ever lies under
the final name but a whole store. Order of the writes: data, sync, journal, sync; at the end the manifest, sync, the
folder's new name, sync. Knows nothing about what a bundle holds.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from offload.closing import Closing, closed_on_error
from offload.errors import FlashError
from offload.memory import reserved_bytes
from offload.store_files import (
    BLOCK_BYTES,
    DATA_NAME,
    FILES,
    JOURNAL_NAME,
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    Files,
    write_all,
)
from offload.store_journal import BundleJournal
from offload.store_key import StoreKey
from offload.store_manifest import Manifest, encode, lay_out, whole_blocks

log = logging.getLogger("strata.store")

BATCH_BYTES = 256 << 20  # of data between two syncs: what a kill may cost
WRITE_BYTES = 4 << 20
T = TypeVar("T")


def partial_folder(folder: Path) -> Path:
    """Where a store that is to lie in `folder` is built."""
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


class StoreWriter(Closing):
    """A store in the making. Closed before it is finished, it keeps what is done for the next writer of the same key.

    Bundles may be written by several threads at once. After an error nothing more can be written.
    """

    def __init__(
        self, folder: Path, key: StoreKey, bundles: Sequence[tuple[str, int]], *, files: Files = FILES
    ) -> None:
        """`bundles`: names and bytes. FlashError if there is too little space, or another process builds the store."""
        self.folder = folder
        self._partial = partial_folder(folder)
        self._files = files
        self._manifest = Manifest(key, lay_out(bundles))
        self._pending: dict[int, int] = {}
        self._pending_bytes = 0
        self._failed = False
        self._direct = False
        self._data = -1
        self._space = (0, 0)  # bytes needed, bytes free, at the start
        self._memory: list[NDArray[np.uint8]] = []  # page-aligned, not in use
        self._lock = threading.Lock()  # of the memory and of what is pending
        self._journal = self._tried(self._open_journal)
        with closed_on_error(self):
            self._tried(self._open_data)

    @property
    def done(self) -> frozenset[int]:
        """Indices of the bundles that need not be written any more."""
        return frozenset(self._journal.checksums.keys() | self._pending.keys())

    def write(self, index: int, data: NDArray[np.uint8]) -> None:
        """Writes a bundle, (its bytes,); it counts as done for good after the next batch. FlashError if that fails."""
        bundle = self._manifest.bundles[index]
        if data.nbytes != bundle.num_bytes:
            raise ValueError(f"{data.nbytes} bytes for bundle {bundle.name}, which has {bundle.num_bytes}")
        checksum = xxhash.xxh3_64_intdigest(data.data)
        self._tried(lambda: self._write(data.reshape(-1), bundle.offset))
        with self._lock:
            self._pending[index] = checksum
            self._pending_bytes += bundle.num_bytes
            if self._pending_bytes >= BATCH_BYTES:
                self._tried(self._end_batch)

    def finish(self) -> Manifest:
        """Makes the store a whole one under its own name, in place of an older one; ValueError if bundles are missing.

        FlashError if that fails; another writer can then try again.
        """
        if missing := len(self._manifest.bundles) - len(self.done):
            raise ValueError(f"{missing} bundles were not written")
        self._tried(self._end_batch)
        checksums = self._journal.checksums
        self._manifest = replace(
            self._manifest,
            bundles=tuple(
                replace(bundle, checksum=checksums[index]) for index, bundle in enumerate(self._manifest.bundles)
            ),
        )
        self._tried(self._publish)
        self._release()
        return self._manifest

    def close(self) -> None:
        """Keeps what is done, unless that is nothing; may be called twice."""
        if self._data < 0:
            self._journal.close()
            return
        try:
            if not self._failed:
                self._end_batch()
            if not self._journal.checksums:
                self._files.remove_store(self._partial)
        except OSError as error:
            log.warning("%s: the last bundles are not kept: %s", self._partial, error.strerror or error)
        self._release()

    def _release(self) -> None:
        os.close(self._data)
        self._data = -1
        self._journal.close()

    def _open_journal(self) -> BundleJournal:
        self._files.make_folder(self._partial)
        identity = f"{xxhash.xxh3_64_intdigest(encode(self._manifest)):016x}"
        return BundleJournal(self._partial / JOURNAL_NAME, identity, len(self._manifest.bundles), self._files)

    def _open_data(self) -> None:
        """Opens the data file and takes all its space."""
        total = self._manifest.data_bytes
        self._data = self._files.open(self._partial / DATA_NAME)
        status = os.fstat(self._data)
        if self._journal.checksums and status.st_size != total:
            log.warning("%s: its data file was changed, the build starts anew", self._partial)
            self._journal.restart()
        self._space = max(0, total - status.st_blocks * 512), self._files.free_bytes(self._partial)
        if self._space[0] > self._space[1]:
            raise OSError(errno.ENOSPC, "no space")
        self._files.reserve(self._data, total)
        self._files.sync_folder(self._partial)
        self._files.sync_folder(self._partial.parent)
        try:
            self._files.set_direct(self._data, direct=True)
            self._direct = True
        except OSError as error:
            log.info("%s: no direct writes here (%s), writing through the page cache", self._partial, error)

    def _write(self, data: NDArray[np.uint8], offset: int) -> None:
        """By way of page-aligned memory, in whole blocks."""
        with self._lock:
            memory = self._memory.pop() if self._memory else reserved_bytes(WRITE_BYTES, huge_pages=False)
        for start in range(0, len(data), WRITE_BYTES):
            part = data[start : start + WRITE_BYTES]
            length = whole_blocks(len(part))
            memory[: len(part)] = part
            memory[len(part) : length] = 0
            self._write_blocks(memory[:length].data, offset + start)
        self._memory.append(memory)

    def _write_blocks(self, blocks: memoryview, offset: int) -> None:
        done = 0
        while done < len(blocks):
            direct = self._direct
            try:
                count = self._files.write(self._data, blocks[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                count = 0
            if direct and done + count < len(blocks):
                count -= count % BLOCK_BYTES
            done += count
            if count == 0:
                self._end_direct(direct=direct)

    def _end_direct(self, *, direct: bool) -> None:
        """After a write that took nothing: goes on through the page cache if it was a direct one."""
        if not direct:
            raise OSError(errno.EIO, "a write took no bytes")
        self._files.set_direct(self._data, direct=False)
        self._direct = False

    def _end_batch(self) -> None:
        """Makes what was written count."""
        if self._pending:
            self._files.sync(self._data)
            self._journal.add(self._pending)
            self._pending.clear()
            self._pending_bytes = 0

    def _publish(self) -> None:
        """Writes the manifest and gives the folder its name."""
        descriptor = self._files.open(self._partial / MANIFEST_NAME, empty=True)
        try:
            write_all(self._files, descriptor, encode(self._manifest), 0)
            self._files.sync(descriptor)
        finally:
            os.close(descriptor)
        self._files.sync_folder(self._partial)
        if self.folder.exists():
            self._files.remove_store(self.folder)
        self._files.rename(self._partial, self.folder)
        self._files.sync_folder(self.folder.parent)
        self._files.remove(self.folder / JOURNAL_NAME)

    def _tried(self, action: Callable[[], T]) -> T:
        """What `action` returns; FlashError for its OSError, and for everything that comes after one."""
        if self._failed:
            raise FlashError(f"{self._partial}: an earlier write failed", hint="start again: what is done is kept")
        try:
            return action()
        except OSError as error:
            self._failed = True
            raise self._error(error) from error

    def _error(self, error: OSError) -> FlashError:
        if error.errno == errno.ENOSPC:
            needed, free = (f"{num_bytes / 2**20:.1f} MiB" for num_bytes in self._space)
            return FlashError(
                f"{self.folder}: the store needs {needed} more on this drive, {free} were free",
                hint="free some space, or choose another folder: what is done is kept",
            )
        return FlashError(
            f"{self.folder}: building the store failed: {error.strerror or error}",
            hint="check the folder's rights and the drive, then start again: what is done is kept",
        )
