"""A model in the GGUF format: metadata, the index of its tensors, and their bytes, over one file or its shards.

Knows nothing about architectures, tokenizers or where weights will lie. Opening reads the headers alone; weights are
read by position, never memory-mapped. A file may be read from several threads at once. Of a file on a server there
is the header alone.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from offload.closing import Closing
from offload.errors import RequestError
from offload.gguf_access import REQUIRED, MetadataAccess
from offload.gguf_header import GGUFHeader, read_header
from offload.gguf_shards import open_shards
from offload.gguf_source import ByteSource
from offload.gguf_tensors import TensorInfo
from offload.gguf_values import MetadataValue, StringArray
from offload.remote_file import RemoteFile
from offload.remote_source import RemoteSource
from offload.source import FileName, Source

__all__ = ["REQUIRED", "GGUFFile", "MetadataValue", "StringArray", "TensorInfo"]


class GGUFFile(MetadataAccess, Closing):
    """An open model and a context manager; `metadata` is the first shard's, `tensors` all shards' in file order."""

    def __init__(self, path: FileName, sources: tuple[Source, ...], headers: tuple[GGUFHeader, ...]) -> None:
        """Use `open`. `sources[i]` is the file of `headers[i]`; they belong to this object from now on."""
        self.path = path
        self.paths: tuple[FileName, ...] = tuple(source.path for source in sources)
        self.version = headers[0].version
        self.alignment = headers[0].alignment
        self.byte_size = sum(source.size for source in sources)
        self.metadata = headers[0].metadata
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: tensor for header in headers for name, tensor in header.tensors.items()}
        )
        self._sources = sources

    @classmethod
    def open(cls, path: str | os.PathLike[str] | RemoteFile) -> Self:
        """Opens a file, and all of them if it is one of a model's shards (`name-00001-of-0000N.gguf`).

        ModelFormatError if a file is not sound or a shard is missing, FlashError if reading fails; RequestError where
        a server does not give a file.
        """
        if isinstance(path, RemoteFile):
            return cls(path, *open_shards(path, RemoteSource, read_header))
        return cls(Path(path), *open_shards(Path(path), ByteSource, read_header))

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.get_str("general.architecture")

    @property
    def sources(self) -> tuple[ByteSource, ...]:
        """The open local files, by `TensorInfo.shard`; they are closed with this. RequestError for files elsewhere."""
        local = tuple(source for source in self._sources if isinstance(source, ByteSource))
        if len(local) < len(self._sources):
            raise RequestError(f"{self.path}: weights are read from local files", hint="download the model first")
        return local

    def read(self, tensor: TensorInfo, expert: int | None = None) -> NDArray[np.uint8]:
        """The bytes of a tensor, or of one expert of a stacked one, shape (num_bytes,); FlashError if reading fails."""
        offset, size = (tensor.offset, tensor.num_bytes) if expert is None else tensor.expert_slice(expert)
        data = np.empty(size, dtype=np.uint8)
        self._sources[tensor.shard].read_into(data.data, offset)
        return data

    def read_into(self, tensor: TensorInfo, destination: NDArray[np.uint8], *, start: int = 0) -> None:
        """Fills `destination` (contiguous uint8) from byte `start` of the tensor; FlashError if reading fails.

        ValueError if that goes beyond the tensor's bytes.
        """
        if not destination.flags.c_contiguous:
            raise ValueError("the destination is not contiguous")
        if start < 0 or start + destination.nbytes > tensor.num_bytes:
            raise ValueError(
                f"bytes {start} to {start + destination.nbytes} of tensor {tensor.name!r}, which has {tensor.num_bytes}"
            )
        self._sources[tensor.shard].read_into(destination.reshape(-1).data, tensor.offset + start)

    def close(self) -> None:
        """Closes the files; may be called twice."""
        for source in self._sources:
            source.close()
