"""What writing a store asks of the file system, in one object, so that a test's double can fail any of the calls.

Knows nothing about stores beyond the names of their files. Every method raises OSError. Reading goes through
`gguf_source.positional_read`.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

DATA_NAME = "data.bin"
MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "journal"
PARTIAL_SUFFIX = ".partial"
BLOCK_BYTES = 4096


class Files:
    """The file system itself."""

    def open(self, path: Path, *, empty: bool = False) -> int:
        """A descriptor for reading and writing; the file is made if need be, and emptied if wanted."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if empty else 0), 0o644)

    def set_direct(self, descriptor: int, *, direct: bool) -> None:
        """Lets writes pass the page cache by, or not."""
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        bit = getattr(os, "O_DIRECT", 0)
        if not bit:
            raise OSError(errno.EINVAL, "no direct writes on this system")
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | bit if direct else flags & ~bit)

    def reserve(self, descriptor: int, num_bytes: int) -> None:
        """Gives a file exactly this length and, where the file system can, the space for it."""
        os.ftruncate(descriptor, min(num_bytes, os.fstat(descriptor).st_size))
        try:
            if num_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        os.ftruncate(descriptor, num_bytes)

    def free_bytes(self, folder: Path) -> int:
        """Bytes that may still be written to the file system of a folder."""
        stats = os.statvfs(folder)
        return stats.f_bavail * stats.f_frsize

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Writes at an offset; how many bytes it took."""
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        """Returns when what was written is on the drive."""
        os.fsync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Returns when the names in a folder are on the drive."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_folder(self, folder: Path) -> None:
        """Makes a folder, and those above it, unless it is there."""
        folder.mkdir(parents=True, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file or folder another name."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Removes a file."""
        path.unlink()

    def remove_store(self, folder: Path) -> None:
        """Removes a store's files, its manifest first, and its folder; OSError if other things are in there."""
        for name in (MANIFEST_NAME, DATA_NAME, JOURNAL_NAME):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


FILES = Files()


def write_all(files: Files, descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at an offset; OSError."""
    view = memoryview(data)
    while view:
        count = files.write(descriptor, view, offset)
        view, offset = view[count:], offset + count


def replace_file(files: Files, path: Path, data: bytes | memoryview, partial: Path) -> None:
    """Puts `data` in place of what `path` holds, which stays until all is on the drive as `partial`; OSError.

    Where that fails nothing is left of `partial`. The new name is on the drive after `Files.sync_folder`.
    """
    descriptor = files.open(partial, empty=True)
    try:
        try:
            files.reserve(descriptor, memoryview(data).nbytes)
            write_all(files, descriptor, data, 0)
            files.sync(descriptor)
        finally:
            os.close(descriptor)
        files.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that counts is on its way
            partial.unlink(missing_ok=True)
        raise
