"""How fast a drive reads, by size of a read, reads at a time, and with or without the page cache.

Reads a file that is there, or one written for it, in places that are drawn by chance, from several threads into
huge pages. Buffered reads start cold: the file's pages are dropped from the cache before. Knows nothing about
models; file systems without `O_DIRECT` give buffered figures alone.
"""

import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload.memory import read_buffer

SIZES = (16 << 10, 128 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 4, 16)
LEAST_FILE_BYTES = 64 << 20
PROBE_FILE_BYTES = 512 << 20
SECONDS_A_POINT = 0.25
_WRITE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ReadFigure:
    """Bytes a second of reads of `read_bytes` each, `depth` at a time."""

    read_bytes: int
    depth: int
    direct: bool
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DriveFigures:
    """What one file system's drive gave; `write_bytes_per_s` is 0 where nothing was written."""

    reads: tuple[ReadFigure, ...]
    write_bytes_per_s: float


def filesystem_key(path: Path) -> str:
    """Names the file system that `path`, or its nearest folder that exists, lies on."""
    return str(_existing(path).stat().st_dev)


Points = tuple[tuple[int, int], ...]
ALL_POINTS: Points = tuple((size, depth) for size in SIZES for depth in DEPTHS)
STREAMING_POINTS: Points = ((1 << 20, 4),)  # what weights are streamed by


def probe(path: Path, *, points: Points = ALL_POINTS, seconds_a_point: float = SECONDS_A_POINT) -> DriveFigures:
    """Measure the drive under `path`, a file of 64 MiB or more to read, or a place where one may be written.

    `points`: (bytes of a read, reads at a time), each measured for `seconds_a_point` with and without the page cache.
    OSError where nothing can be read, nor written beside it.
    """
    if path.is_file() and path.stat().st_size >= LEAST_FILE_BYTES:
        return DriveFigures(tuple(_reads(path, points, seconds_a_point)), 0.0)
    with _written(_existing(path)) as (file, write_bytes_per_s):
        return DriveFigures(tuple(_reads(file, points, seconds_a_point)), write_bytes_per_s)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


@contextmanager
def _written(place: Path) -> Iterator[tuple[Path, float]]:
    """A file of random bytes on the drive, and how fast it was written; a tenth of the free space at most."""
    folder = place if place.is_dir() else place.parent
    stats = os.statvfs(folder)
    size = min(PROBE_FILE_BYTES, stats.f_bavail * stats.f_frsize // 10) // _WRITE_BYTES * _WRITE_BYTES
    if size < LEAST_FILE_BYTES:
        raise OSError(f"{folder}: too little free space to measure the drive with")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".strata-probe-") as file:
        block = os.urandom(_WRITE_BYTES)
        started = time.perf_counter()
        for _ in range(size // _WRITE_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name), size / (time.perf_counter() - started)


def _reads(path: Path, points: Points, seconds: float) -> Iterator[ReadFigure]:
    for direct in (True, False):
        flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)
        if direct and not hasattr(os, "O_DIRECT"):
            continue
        try:
            descriptor = os.open(path, flags)
        except OSError:
            if direct:
                continue  # the file system has none, tmpfs for one
            raise
        try:
            for size, depth in points:
                yield ReadFigure(size, depth, direct, _rate(descriptor, size, depth, seconds))
        finally:
            os.close(descriptor)


def _rate(descriptor: int, size: int, depth: int, seconds: float) -> float:
    """Bytes a second of `depth` threads that read places of their own until the time is over."""
    places = os.fstat(descriptor).st_size // size
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    order = random.Random(size * depth).sample(range(places), places)
    started = time.perf_counter()

    def read(first: int) -> int:
        done = 0
        buffer = read_buffer(size).data[:size]
        for place in order[first::depth]:
            done += os.preadv(descriptor, [buffer], place * size)
            if time.perf_counter() - started > seconds:
                break
        return done

    with ThreadPoolExecutor(depth, "strata-probe") as pool:
        done = sum(pool.map(read, range(depth)))
    return done / (time.perf_counter() - started)
