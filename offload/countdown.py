"""A call that waits for several things to have happened. Knows nothing about what they are."""

import threading
from collections.abc import Callable


class Countdown:
    """Calls something when it was told so often, at once for 0. From any thread."""

    def __init__(self, count: int, call: Callable[[], None]) -> None:
        self._count, self._call = count, call
        self._lock = threading.Lock()
        if not count:
            call()

    def one_less(self) -> None:
        """Tells it once."""
        with self._lock:
            self._count -= 1
            is_last = self._count == 0
        if is_last:
            self._call()
