"""Reads that fail at chosen calls: doubles for `gguf_source.positional_read`."""

import errno
import threading
from collections.abc import Callable

from offload import gguf_source


class FailingReads:
    """Fails from call `first` on, `times` times; counts calls of all threads."""

    def __init__(self, first: int, times: int, code: int = errno.EIO) -> None:
        self.calls = 0
        self._failing = range(first, first + times)
        self._code = code
        self._lock = threading.Lock()
        self._read: Callable[[int, memoryview, int], int] = gguf_source.positional_read

    def __call__(self, descriptor: int, destination: memoryview, offset: int) -> int:
        with self._lock:
            self.calls += 1
            fails = self.calls in self._failing
        if fails:
            raise OSError(self._code, "injected")
        return self._read(descriptor, destination, offset)
