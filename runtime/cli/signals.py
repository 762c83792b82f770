"""Ctrl-C and SIGTERM: the first stops at a token boundary, a second Ctrl-C ends the process with 130.

Knows nothing of engines: it sets an event that they watch.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


@contextmanager
def stop_at_token_boundary() -> Iterator[threading.Event]:
    """While open, SIGINT and SIGTERM set the event that is yielded instead of raising."""
    stop = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
