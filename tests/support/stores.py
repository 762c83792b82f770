"""Small stores, and file systems that fail or lose what was not synced."""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.store import Store
from offload.store_files import FILES, Files
from offload.store_key import SourceIdentity, StoreKey
from offload.store_writer import StoreWriter

KEY = StoreKey((SourceIdentity("/models", "model.gguf", 1000, 123, 456),), "layout")
SIZES = (5000, 1, 4096, 9000, 100)
BUNDLES = tuple((f"bundle.{index}", size) for index, size in enumerate(SIZES))
METHODS = tuple(name for name in vars(Files) if not name.startswith("_"))


def contents(sizes: Sequence[int] = SIZES) -> list[NDArray[np.uint8]]:
    """Random bytes of each bundle."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, size, np.uint8) for size in sizes]


def build(folder: Path, files: Files = FILES, key: StoreKey = KEY) -> None:
    """Builds the store, or goes on building it."""
    with StoreWriter(folder, key, BUNDLES, files=files) as writer:
        done = writer.done
        for index, data in enumerate(contents()):
            if index not in done:
                writer.write(index, data)
        writer.finish()


def is_whole(folder: Path) -> bool:
    """Whether everything that was written is in the store, and nothing else."""
    with Store.open(folder, KEY) as store:
        if store.verify():
            return False
        for index, data in enumerate(contents()):
            read = np.empty_like(data)
            store.read_into(index, read)
            if not np.array_equal(read, data):
                return False
    return sorted(path.name for path in folder.iterdir()) == ["data.bin", "manifest.json"]


class FailingFiles(Files):
    """Fails with `code` at the calls `first` to `last`, whichever they are."""

    def __init__(self, first: int, last: int, code: int) -> None:
        self.first, self.last, self.code = first, last, code
        self.calls = 0

    def before(self, _name: str) -> None:
        """Counts a call."""
        self.calls += 1
        if self.first <= self.calls <= self.last:
            raise OSError(self.code, os.strerror(self.code))


class KillingFiles(Files):
    """Its process is killed at the call behind `calls` others."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def before(self, _name: str) -> None:
        """Counts a call."""
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


class PowerLost(BaseException):
    """Nothing runs any more."""


class LosingFiles(Files):
    """Loses power at the call `last`; what was not synced by then may be there, be missing, or be garbage."""

    def __init__(self, last: int, seed: int = 0) -> None:
        self.last = last
        self.calls = 0
        self._rng = np.random.default_rng([seed, last])
        self._opened: list[int] = []
        self._written: list[tuple[int, int, bytes]] = []  # descriptor, offset, what was there before
        self._renamed: list[tuple[Path, Path, bytes | None]] = []  # and what the new name had before

    def before(self, _name: str) -> None:
        """Counts a call."""
        self.calls += 1
        if self.calls >= self.last:
            raise PowerLost

    def open(self, path: Path, *, empty: bool = False) -> int:
        self.before("open")
        descriptor = super().open(path, empty=empty)
        self._opened.append(descriptor)
        return descriptor

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.before("write")
        copy = os.dup(descriptor)
        super().set_direct(copy, direct=False)
        self._written.append((copy, offset, os.pread(copy, len(data), offset)))
        return super().write(descriptor, data, offset)

    def set_direct(self, descriptor: int, *, direct: bool) -> None:
        raise OSError(22, "no direct writes here")

    def sync(self, descriptor: int) -> None:
        self.before("sync")
        super().sync(descriptor)
        inode = os.fstat(descriptor).st_ino
        for entry in [entry for entry in self._written if os.fstat(entry[0]).st_ino == inode]:
            os.close(entry[0])
            self._written.remove(entry)

    def rename(self, old: Path, new: Path) -> None:
        self.before("rename")
        replaced = new.read_bytes() if new.is_file() else None
        super().rename(old, new)
        self._renamed.append((old, new, replaced))

    def sync_folder(self, folder: Path) -> None:
        self.before("sync_folder")
        super().sync_folder(folder)
        self._renamed = [renamed for renamed in self._renamed if renamed[1].parent != folder]

    def lose_power(self) -> None:
        """What the drive has afterwards."""
        for copy, offset, old in reversed(self._written):
            fate = self._rng.integers(3)
            if fate == 1:
                os.pwrite(copy, self._rng.bytes(max(len(old), 8)), offset)
            elif fate == 2 and old:
                os.pwrite(copy, old, offset)
            elif fate == 2:
                os.ftruncate(copy, offset)
            os.close(copy)
        for old_name, new_name, replaced in reversed(self._renamed):
            new_name.rename(old_name)
            if replaced is not None:
                new_name.write_bytes(replaced)
        for descriptor in self._opened:
            with contextlib.suppress(OSError):  # the writer closed it
                os.close(descriptor)


def _counted(name: str) -> Any:
    method = getattr(Files, name)

    def double(self: Any, *arguments: Any, **settings: Any) -> Any:
        self.before(name)
        return method(self, *arguments, **settings)

    return double


for _name in METHODS:
    setattr(FailingFiles, _name, _counted(_name))
    setattr(KillingFiles, _name, _counted(_name))
    if _name not in vars(LosingFiles):
        setattr(LosingFiles, _name, _counted(_name))
