"""A lock that one process holds, in a file that tells which. Ends with the process however that ends."""

import errno
import fcntl
import os
from pathlib import Path

from offload.closing import Closing
from offload.errors import FlashError, RequestError


def holder(path: Path) -> str | None:
    """The process that holds the lock at `path`: "process 123", "another process"; None: nobody. OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(descriptor)
    finally:
        os.close(descriptor)
    return None


class NamedLock(Closing):
    """The lock at `path`, whose folder must be there, held until it is closed."""

    def __init__(self, path: Path, what: str) -> None:
        """RequestError naming the process that has it; FlashError. `what` it is a lock of, for messages."""
        try:
            self._descriptor = self._taken(path)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)
        except BlockingIOError as error:
            raise RequestError(
                f"{what} is in use by {error.filename}", hint="end that one first, or use another name"
            ) from error
        except OSError as error:
            raise FlashError(
                f"{what} cannot be locked: {path}: {error.strerror or error}", hint="check the folder's rights"
            ) from error

    @property
    def closed(self) -> bool:
        """Whether it was given back."""
        return self._descriptor < 0

    def close(self) -> None:
        """Gives it back; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _taken(self, path: Path) -> int:
        """BlockingIOError with the holder as its file name."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            except BlockingIOError as error:
                name = _named(descriptor)
                os.close(descriptor)
                raise BlockingIOError(errno.EWOULDBLOCK, "locked", name) from error
            except FileNotFoundError:
                if not path.parent.is_dir():
                    os.close(descriptor)
                    raise
            os.close(descriptor)  # what was locked is no longer the file of that name


def _named(descriptor: int) -> str:
    """As the holder wrote it, if it has already."""
    text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
    return f"process {text}" if text.isdecimal() else "another process"
