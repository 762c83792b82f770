"""The output of a batch, which is its journal: one JSON record a line, appended durably, read again on resume.

`append` returns once its records are on the disk (one write, one fsync); what the file holds is therefore exactly what
was ever reported as done, except for a last line cut short by a kill, which the next opening removes. One process may
hold a journal at a time.

Knows nothing about prompts and engines; of a record it knows the id (`custom_id`, else `id`) and `request_sha256`.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offload.closing import Closing
from offload.errors import FlashError, RequestError

MAX_RECORD_BYTES = 64 * 1024 * 1024
_RECORD_START = b'{"id": '


class Journal(Closing):
    """An open journal; `done` maps the id of every record in it to its `request_sha256`."""

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Open or create the file at `path`, lock it, and read what it holds; `overwrite` empties it first.

        Raises `RequestError` where another process holds it or it is no journal, `FlashError` where it cannot be read.
        """
        self.path = Path(path)
        self.done: dict[str, str] = {}
        self._descriptor = self._open()
        try:
            self._lock()
            if overwrite:
                os.ftruncate(self._descriptor, 0)
            self._size = self._read()
            if os.fstat(self._descriptor).st_size > self._size:
                os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)
            self._sync_folder()
        except OSError as error:
            os.close(self._descriptor)
            raise FlashError(f"cannot open the journal {self.path}: {error.strerror or error}") from error
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add records; when this returns they are on the disk, when it raises `FlashError` none of them is."""
        for record in records:
            if record_id(record) in self.done:
                raise ValueError(f"{record_id(record)} is in the journal already")
        lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
        try:
            _write_all(self._descriptor, b"".join(lines))
            os.fsync(self._descriptor)
        except OSError as error:
            message = f"cannot write to {self.path}: {error.strerror or error}"
            try:
                os.ftruncate(self._descriptor, self._size)
            except OSError as cut:
                message += f" (nor cut the half-written record off, which the next start will do: {cut.strerror})"
            raise FlashError(message, hint="free some space; the same command then resumes") from error
        self._size += sum(map(len, lines))
        for record in records:
            self.done[record_id(record)] = record["request_sha256"]

    def close(self) -> None:
        """Let go of the file; further calls do nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        """A descriptor of the file, which is made if need be."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RequestError(f"cannot write to {self.path}: {error.strerror or error}") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise RequestError(f"{self.path} is not a regular file, so a batch written to it could not be resumed")
        return descriptor

    def _lock(self) -> None:
        """Take the lock that goes with the descriptor, and so ends with the process however it ends."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(
                f"{self.path} is being written by another process", hint="wait for it, or choose another -o"
            ) from error

    def _read(self) -> int:
        """Fill `done` from the file; the number of bytes that whole records take."""
        size = 0
        torn = 0
        for number, line in enumerate(self._lines(), start=1):
            if torn:
                raise self._foreign(torn)
            if _is_torn(line):
                torn = number
                continue
            key, sha256 = self._parse(line, number)
            if key in self.done:
                raise RequestError(
                    f"{self.path} has two records of {key!r}, the second on line {number}", hint="give --overwrite"
                )
            self.done[key] = sha256
            size += len(line)
        return size

    def _lines(self) -> Iterator[bytes]:
        """The file's lines, the last one perhaps without its end."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            number = 0
            while line := file.readline(MAX_RECORD_BYTES + 1):
                number += 1
                if len(line) > MAX_RECORD_BYTES:
                    raise self._foreign(number)
                yield line

    def _parse(self, line: bytes, number: int) -> tuple[str, str]:
        """Id and `request_sha256` of a record."""
        try:
            record = json.loads(line)
            key, sha256 = record_id(record), record["request_sha256"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._foreign(number) from error
        if not (isinstance(key, str) and isinstance(sha256, str)):
            raise self._foreign(number)
        return key, sha256

    def _foreign(self, number: int) -> RequestError:
        """The error for a file that no batch wrote; it is left as it is."""
        return RequestError(
            f"line {number} of {self.path} is not a record of a batch, so the file is left alone",
            hint="choose another -o, or give --overwrite",
        )

    def _sync_folder(self) -> None:
        """Make the file's name as durable as its contents."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def record_id(record: Mapping[str, Any]) -> str:
    """The id of the line that a record answers."""
    key: str = record["custom_id"] if "custom_id" in record else record["id"]
    return key


def _is_torn(line: bytes) -> bool:
    """Whether a line is what a kill, or a power loss (which may leave zeros behind), made of a record."""
    if line.endswith(b"\n") and b"\0" not in line:
        return False
    text = line.rstrip(b"\n").rstrip(b"\0")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return _RECORD_START.startswith(text[: len(_RECORD_START)])
    return isinstance(record, dict) and "request_sha256" in record


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, in one call unless the system takes less."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
