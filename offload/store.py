"""A store: bundles of bytes that were derived from other files once, each in a place and under a checksum of its own.

A folder with `data.bin`, the bundles in whole blocks one after another, and `manifest.json`. Knows nothing about what a
bundle holds. Invariant: bytes that `read_into` hands out are those that were written. Who reads the data otherwise asks
`check` about what was read.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from offload.closing import Closing
from offload.errors import FlashError, ModelFormatError
from offload.gguf_source import ByteSource
from offload.store_files import DATA_NAME
from offload.store_key import StoreKey
from offload.store_manifest import REBUILD_HINT, Manifest, read_manifest, whole_blocks

log = logging.getLogger("strata.store")

VERIFY_THREADS = 4

Progress = Callable[[int, int], None]


class Place(NamedTuple):
    """Where a bundle lies in the data file, in bytes, and its checksum (XXH3, 64 bits)."""

    offset: int
    num_bytes: int
    checksum: int


class Store(Closing):
    """An open store; may be read from several threads at once."""

    def __init__(self, folder: Path, manifest: Manifest, source: ByteSource) -> None:
        """Use `open`. `source` is the data file, and belongs to this object from now on."""
        self.folder = folder
        self.manifest = manifest
        self.source = source
        self._indices = {bundle.name: index for index, bundle in enumerate(manifest.bundles)}

    @classmethod
    def open(cls, folder: Path, key: StoreKey | None = None) -> Self:
        """The store in a folder, for use with `key`.

        FlashError if it cannot be read; ModelFormatError if it is damaged, or made from or for something else.
        """
        manifest = read_manifest(folder)
        if key is not None and manifest.key != key:
            raise ModelFormatError(
                f"{folder}: the store is for another use: {'; '.join(manifest.key.differences(key))}",
                hint="make one with `strata pack`",
            )
        source = ByteSource(folder / DATA_NAME)
        if source.size != manifest.data_bytes:
            source.close()
            raise ModelFormatError(
                f"{source.path}: has {source.size} bytes, the manifest says {manifest.data_bytes}", hint=REBUILD_HINT
            )
        return cls(folder, manifest, source)

    @property
    def path(self) -> Path:
        """Of the data file."""
        return self.source.path

    @property
    def num_bytes(self) -> int:
        """Of the data file."""
        return self.source.size

    def index(self, name: str) -> int:
        """The number of the bundle of that name; KeyError if there is none."""
        return self._indices[name]

    def place(self, index: int) -> Place:
        """Where a bundle lies; what follows it up to a multiple of `BLOCK_BYTES` is the file's too, zeros."""
        bundle = self.manifest.bundles[index]
        return Place(bundle.offset, bundle.num_bytes, bundle.checksum)

    def check(self, index: int, data: NDArray[np.uint8]) -> bool:
        """Whether `data` (contiguous) is what was written as this bundle."""
        bundle = self.manifest.bundles[index]
        return data.nbytes == bundle.num_bytes and xxhash.xxh3_64_intdigest(data.data) == bundle.checksum

    def read_into(self, index: int, destination: NDArray[np.uint8]) -> None:
        """Fills `destination`, (the bundle's bytes,), contiguous; bytes that are wrong are read once more.

        FlashError if reading fails, or they are still wrong: then `destination` must not be used.
        """
        bundle = self.manifest.bundles[index]
        if destination.nbytes != bundle.num_bytes:
            raise ValueError(f"{destination.nbytes} bytes for bundle {bundle.name}, which has {bundle.num_bytes}")
        for _ in range(2):
            self.source.read_into(destination.data, bundle.offset)
            if self.check(index, destination):
                return
            log.warning("%s: bundle %s was read with a wrong checksum", self.path, bundle.name)
        raise FlashError(f"{self.path}: bundle {bundle.name} is damaged", hint=REBUILD_HINT)

    def verify(self, progress: Progress | None = None) -> tuple[str, ...]:
        """Reads everything; the names of the bundles that are not as they were written. FlashError if reading fails.

        `progress(done, total)` hears of the bytes.
        """
        bad = []
        with ThreadPoolExecutor(VERIFY_THREADS, "strata-verify") as pool:
            checks = pool.map(self._is_whole, range(len(self.manifest.bundles)))
            for bundle, is_whole in zip(self.manifest.bundles, checks, strict=True):
                if not is_whole:
                    bad.append(bundle.name)
                if progress is not None:
                    progress(bundle.end, self.num_bytes)
        return tuple(bad)

    def _is_whole(self, index: int) -> bool:
        """Whether a bundle, and the zeros behind it, are as they were written."""
        bundle = self.manifest.bundles[index]
        data = np.empty(whole_blocks(bundle.num_bytes), np.uint8)
        self.source.read_into(data.data, bundle.offset)
        return self.check(index, data[: bundle.num_bytes]) and not data[bundle.num_bytes :].any()

    def close(self) -> None:
        """Closes the data file; may be called twice."""
        self.source.close()
