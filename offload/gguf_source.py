"""One open model file: bytes at an offset, read by position into memory the caller owns.

Knows nothing about what the bytes mean. The file is held by its descriptor and never memory-mapped, so that a fault
of the drive is an error of one read and not a signal. After every read the file's identity (device, inode, size,
modification time) is compared with the one at opening: bytes of a file that changed underneath are never handed out.
`positional_read` is the seam through which tests inject faults.
"""

import errno
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from offload.errors import FlashError, ModelFormatError

PositionalRead = Callable[[int, memoryview, int], int]
"""(descriptor, destination, offset) -> bytes read, 0 at the end of the file; raises OSError."""

EIO_RETRIES = 3
EIO_PAUSE_S = 0.01  # doubled after every failure
_SEEK_LOCK = threading.Lock()


def _read_preadv(descriptor: int, destination: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [destination], offset)


def _read_pread(descriptor: int, destination: memoryview, offset: int) -> int:
    data = os.pread(descriptor, len(destination), offset)
    destination[: len(data)] = data
    return len(data)


def _read_seek(descriptor: int, destination: memoryview, offset: int) -> int:
    """For systems without positional reads: seek and read under one lock."""
    with _SEEK_LOCK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(destination))
    destination[: len(data)] = data
    return len(data)


def default_positional_read() -> PositionalRead:
    """The best way to read at an offset that this system has."""
    if hasattr(os, "preadv"):
        return _read_preadv
    return _read_pread if hasattr(os, "pread") else _read_seek


positional_read: PositionalRead = default_positional_read()


def reads_plainly() -> bool:
    """Whether positional reads are the system's own, which compiled code can make as well."""
    return positional_read is _read_preadv


class ByteSource:
    """A regular file open for reading; may be read from several threads at once.

    `changes`: this process writes to it meanwhile, so that its size and time tell nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, changes: bool = False) -> None:
        """Opens `path`; FlashError if that fails, ModelFormatError if it is not a regular file."""
        self.path = Path(path)
        self._changes = changes
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # asked before opening: a FIFO would block
                raise ModelFormatError(f"{self.path}: is not a regular file", hint="give the path of a .gguf file")
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise FlashError(
                f"{self.path}: cannot be opened: {reason}", hint="check the path and its rights"
            ) from error
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        self._identity = self._current_identity()
        self.size: int = self._identity[2]

    def identity_of(self, descriptor: int) -> tuple[int, int, int, int]:
        """(device, inode, size, modification time in ns) of an open file, the last two only where they must not change.

        Equal to `identity` for this file.
        """
        status = os.fstat(descriptor)
        if self._changes:
            return status.st_dev, status.st_ino, 0, 0
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _current_identity(self) -> tuple[int, int, int, int]:
        return self.identity_of(self._descriptor)

    def close(self) -> None:
        """Gives the descriptor back; reading afterwards is an error. May be called twice."""
        self._finalizer()

    def forget(self) -> None:
        """Advises the system to drop what it keeps of the file in RAM; nothing where it takes no such advice."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """(device, inode, size, modification time in ns) at opening."""
        return self._identity

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def check_identity(self) -> None:
        """FlashError if the file was changed since it was opened."""
        now = self._current_identity()
        if now == self._identity:
            return
        change = f"{self.size} bytes at opening, {now[2]} now" if now[2] != self.size else "it was written to"
        raise FlashError(
            f"{self.path}: the file changed while in use ({change})",
            hint="let the download or copy finish, then start again",
        )

    def read_into(self, destination: memoryview, offset: int) -> None:
        """Fills `destination` (contiguous bytes) from byte `offset`; short reads go on, EIO is tried again a few times.

        FlashError if the drive fails for good, or the file ends early or changed.
        """
        if self.closed:
            raise FlashError(f"{self.path}: read after the file was closed")
        done, failures = 0, 0
        while done < len(destination):
            try:
                count = positional_read(self._descriptor, destination[done:], offset + done)
            except OSError as error:
                failures += 1
                if error.errno != errno.EIO or failures > EIO_RETRIES:
                    raise self._read_error(error, offset + done) from error
                time.sleep(EIO_PAUSE_S * 2 ** (failures - 1))
                continue
            if count == 0:
                self.check_identity()
                raise FlashError(
                    f"{self.path}: the file ends at byte {offset + done}, {len(destination) - done} more were expected",
                    hint="download the file again",
                )
            done += count
        self.check_identity()

    def _read_error(self, error: OSError, offset: int) -> FlashError:
        return FlashError(
            f"{self.path}: reading at byte {offset} failed: {error.strerror or error}",
            hint="check the drive and its cable (kernel log, SMART), then start again",
        )
