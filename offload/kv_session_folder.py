"""A folder of KV blocks, a file each: which there are, writing, and the eviction of those used longest ago.

A block is there as a whole or not at all: it is written under another name, synced, and renamed. Blocks never change,
so that several processes may read and write the same ones. Knows nothing about sequences.
"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.errors import FlashError
from offload.kv_session_block import HEADER_BYTES, BlockSize, seal
from offload.memory import reserved_bytes
from offload.store_files import FILES, PARTIAL_SUFFIX, Files, replace_file

log = logging.getLogger("strata.session")

SUFFIX = ".kv"
FREE_BYTES = 256 << 20  # of the drive that are left to others
STALE_S = 3600.0  # after which a file that was not finished is a killed process's

Fill = Callable[[int, NDArray[np.uint8]], None]
"""(index among the blocks to be written, memory for its rows)."""


@dataclass(frozen=True, slots=True)
class Held:
    """A file of the folder; `used_ns` by the clock of files."""

    path: Path
    num_bytes: int
    used_ns: int


class BlockFolder:
    """The blocks in `folder`, which need not be there yet; `most_bytes`: of all their files, None for no limit."""

    def __init__(self, folder: Path, *, most_bytes: int | None = None, files: Files = FILES) -> None:
        self.folder = folder
        self._most_bytes = most_bytes
        self._files = files

    def path(self, digest: bytes) -> Path:
        """Where the block of that name lies, or would lie."""
        return self.folder / (digest.hex() + SUFFIX)

    def has(self, digest: bytes) -> bool:
        """Whether it is there."""
        return self.path(digest).exists()

    def held(self) -> list[Held]:
        """All files of blocks, finished or not; FlashError."""
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if SUFFIX in entry.name:
                        with contextlib.suppress(FileNotFoundError):  # another process removed it
                            status = entry.stat()
                            found.append(Held(Path(entry.path), status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._error("cannot be listed", error) from error
        return found

    def write(self, digests: Sequence[bytes], size: BlockSize, fill: Fill) -> int:
        """Writes blocks, and how many: fewer, the first ones, where the limit or the drive has no room for all.

        They are on the drive when this returns. FlashError; then those that were finished stay.
        """
        count = self._room(len(digests), size)
        try:
            memory = reserved_bytes(size.file_bytes, huge_pages=False)
            if count:
                self._files.make_folder(self.folder)
                self.folder.chmod(0o700)
            for index, digest in enumerate(digests[:count]):
                fill(index, memory[HEADER_BYTES : HEADER_BYTES + size.num_bytes])
                seal(memory, digest, size)
                self._write(self.path(digest), memory)
            if count:
                self._files.sync_folder(self.folder)
        except MemoryError as error:
            raise FlashError(f"{self.folder}: KV cannot be written: there is no memory for {error}") from error
        except OSError as error:
            raise self._error("KV cannot be written", error) from error
        return count

    def touch(self, digests: Sequence[bytes]) -> None:
        """These are in use, the first ones, without which the others are of no use, most of all."""
        now = time.time_ns()
        for place, digest in enumerate(digests):
            with contextlib.suppress(OSError):  # evicted meanwhile, or a folder that only may be read
                os.utime(self.path(digest), ns=(now - place, now - place))

    def drop(self, digest: bytes) -> None:
        """Removes a block if it is there; FlashError."""
        self._remove(self.path(digest))

    def keep_only(self, digests: Collection[bytes]) -> None:
        """Removes all others, and what was not finished; FlashError."""
        names = {self.path(digest).name for digest in digests}
        for held in self.held():
            if held.path.name not in names:
                self._remove(held.path)

    def _room(self, count: int, size: BlockSize) -> int:
        """So many blocks of `count` may be written; for them others are removed that were used longer ago."""
        if self._most_bytes is not None:
            count = min(count, self._most_bytes // size.file_bytes)
            self._evict(self._most_bytes - count * size.file_bytes)
        folder = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        try:
            free = self._files.free_bytes(folder) - FREE_BYTES
        except OSError as error:
            raise self._error("its drive cannot be asked for its free space", error) from error
        if count * size.file_bytes > free:
            needed = f"{count * size.file_bytes / 2**20:.0f} MiB of KV need room on this drive"
            log.warning("%s: %s, %.0f MiB may be used", self.folder, needed, max(0, free) / 2**20)
        return max(0, min(count, free // size.file_bytes))

    def _evict(self, most_bytes: int) -> None:
        held = sorted(self.held(), key=lambda one: one.used_ns)
        total = sum(one.num_bytes for one in held)
        stale_ns = time.time_ns() - int(STALE_S * 1e9)
        for one in held:
            is_stale = one.path.name.endswith(PARTIAL_SUFFIX) and one.used_ns < stale_ns
            if total > most_bytes or is_stale:
                self._remove(one.path)
                total -= one.num_bytes

    def _write(self, path: Path, memory: NDArray[np.uint8]) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        replace_file(self._files, path, memory.data, partial)

    def _remove(self, path: Path) -> None:
        try:
            self._files.remove(path)
        except FileNotFoundError:
            log.debug("%s is gone already", path)
        except OSError as error:
            raise self._error("KV cannot be removed", error) from error

    def _error(self, what: str, error: OSError) -> FlashError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space on this drive" if full else "check the folder's rights and the drive"
        return FlashError(f"{self.folder}: {what}: {error.strerror or error}", hint=hint)
