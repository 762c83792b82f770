"""What the readers of headers need of a model file, wherever it lies: a name for messages, a size, bytes at an offset.

`offload.gguf_source.ByteSource` is a local file with a `pathlib.Path`, `offload.remote_source.RemoteSource` one on a
server with a `RemoteFile`.
"""

from typing import Protocol, Self


class FileName(Protocol):
    """A name as `pathlib.PurePath` has it; `str` of it is what messages call the file."""

    @property
    def name(self) -> str:
        """The last part."""

    @property
    def stem(self) -> str:
        """`name` without its last suffix."""

    def with_name(self, name: str, /) -> Self:
        """The file called `name` beside this one."""


class Source(Protocol):
    """An open file."""

    @property
    def path(self) -> FileName:
        """Its name."""

    @property
    def size(self) -> int:
        """Bytes in it."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""

    def close(self) -> None:
        """Gives back what is held; may be called twice."""

    def check_identity(self) -> None:
        """FlashError if the file was changed since it was opened."""

    def read_into(self, destination: memoryview, offset: int, /) -> None:
        """Fills `destination` (contiguous bytes) from byte `offset`; FlashError if that fails."""
