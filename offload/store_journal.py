"""The journal of a store that is being built: which bundles are on the drive already, with their checksums.

A line a bundle, added and synced in batches; what a kill or a power loss left of the last lines is cut off. One process
may hold a journal at a time. Knows nothing about the data itself.
"""

import fcntl
import os
import re
from collections.abc import Mapping
from pathlib import Path

from offload.closing import Closing, closed_on_error
from offload.errors import FlashError
from offload.store_files import Files, write_all

_LINE = re.compile(rb"(\d{1,9}) ([0-9a-f]{16})\n")
_START = b"strata store journal "


def is_held(path: Path) -> bool:
    """Whether a process is building the store whose journal lies at `path`; OSError."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class BundleJournal(Closing):
    """An open journal; `checksums` has those of the bundles that are done, by their index."""

    def __init__(self, path: Path, identity: str, bundles: int, files: Files) -> None:
        """Opens or makes the journal of so many bundles; one that is not of `identity` is begun anew.

        OSError; FlashError if another process holds it.
        """
        self.checksums: dict[int, int] = {}
        self._files = files
        self._start = _START + identity.encode() + b"\n"
        self._descriptor = files.open(path)
        with closed_on_error(self):
            self._lock(path)
            self._size = self._parse(path.read_bytes(), bundles)
            os.ftruncate(self._descriptor, self._size)
            if self._size == 0:
                self._append(self._start)

    def add(self, checksums: Mapping[int, int]) -> None:
        """Returns when these bundles' lines are on the drive, as their data is already; OSError."""
        self._append(b"".join(b"%d %016x\n" % line for line in checksums.items()))
        self.checksums.update(checksums)

    def restart(self) -> None:
        """Forgets all bundles; OSError."""
        self.checksums.clear()
        self._size = 0
        os.ftruncate(self._descriptor, 0)
        self._append(self._start)

    def close(self) -> None:
        """Lets go of the file; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FlashError(f"{path.parent}: another process is building this store", hint="wait for it") from error

    def _parse(self, text: bytes, bundles: int) -> int:
        """Fills `checksums`; the bytes that whole lines take, 0 if the journal is another one's."""
        if not text.startswith(self._start):
            return 0
        position = len(self._start)
        while (line := _LINE.match(text, position)) and int(line[1]) < bundles:
            self.checksums[int(line[1])] = int(line[2], 16)
            position = line.end()
        return position

    def _append(self, lines: bytes) -> None:
        write_all(self._files, self._descriptor, lines, self._size)
        self._files.sync(self._descriptor)
        self._size += len(lines)
