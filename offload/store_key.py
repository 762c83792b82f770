"""What a store was made from and for: the identity of the source files, and the name of the layout of its bundles.

Two keys are equal where a store made for one can be used for the other. Knows nothing about what a layout is.
"""

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from offload.errors import FlashError
from offload.gguf import GGUFFile
from offload.gguf_source import ByteSource


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """A file: where it lay, which does not count, and what tells it from others.

    `header_xxh3`: of the bytes before its tensors' data.
    """

    folder: str = field(compare=False)
    name: str
    num_bytes: int
    mtime_ns: int
    header_xxh3: int

    @property
    def path(self) -> Path:
        """Where it lay when the store was made."""
        return Path(self.folder) / self.name


@dataclass(frozen=True, slots=True)
class StoreKey:
    """The files of a model, in the order of their shards, and the layout that their weights were brought into."""

    sources: tuple[SourceIdentity, ...]
    layout: str

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that stand for the key in names."""
        parts = [self.layout, *(astuple(source)[1:] for source in self.sources)]
        return f"{xxhash.xxh3_64_intdigest(json.dumps(parts).encode()):016x}"[:12]

    def differences(self, other: "StoreKey") -> Iterator[str]:
        """What differs, in words: this key's value first."""
        if len(self.sources) != len(other.sources):
            yield f"{len(self.sources)} source files, not {len(other.sources)}"
        for mine, its in zip(self.sources, other.sources, strict=False):
            if mine.name != its.name:
                yield f"its source is {mine.name}, not {its.name}"
            elif mine.num_bytes != its.num_bytes:
                yield f"{mine.name} had {mine.num_bytes} bytes, it has {its.num_bytes} now"
            elif mine.header_xxh3 != its.header_xxh3:
                yield f"{mine.name} had another header"
            elif mine.mtime_ns != its.mtime_ns:
                yield f"{mine.name} was written to since"
        if self.layout != other.layout:
            yield f"its layout is {self.layout}, not {other.layout}"


def store_key(gguf: GGUFFile, layout: str) -> StoreKey:
    """The key of a store made from an open model; FlashError if its headers cannot be read."""
    starts: dict[int, int] = {}
    for tensor in gguf.tensors.values():
        starts[tensor.shard] = min(tensor.offset, starts.get(tensor.shard, tensor.offset))
    identities = [_identity(source, starts.get(shard, source.size)) for shard, source in enumerate(gguf.sources)]
    return StoreKey(tuple(identities), layout)


def _identity(source: ByteSource, header_bytes: int) -> SourceIdentity:
    header = np.empty(header_bytes, np.uint8)
    source.read_into(header.data, 0)
    path = source.path.absolute()
    try:
        status = path.stat()
    except OSError as error:
        raise FlashError(f"{path}: the file went away while in use: {error.strerror}", hint="start again") from error
    return SourceIdentity(
        str(path.parent), path.name, source.size, status.st_mtime_ns, xxhash.xxh3_64_intdigest(header.data)
    )
