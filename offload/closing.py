"""Things that must be closed, as context managers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self


class Closable(Protocol):
    """What holds something until it is closed."""

    def close(self) -> None: ...


@contextmanager
def closed_on_error(thing: Closable) -> Iterator[None]:
    """Closes `thing` if the block raises: for what is made before the rest that it belongs to."""
    try:
        yield
    except BaseException:
        thing.close()
        raise


class Closing(ABC):
    """`with` closes it at the end of the block."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
