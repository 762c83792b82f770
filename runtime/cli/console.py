"""The terminal: one console on stderr for plans, progress and notes; stdout belongs to the answer alone.

Progress is drawn on a terminal only, and `NO_COLOR` is honoured by rich itself.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)

Report = Callable[[int, int], None]


def set_up_logging(verbosity: int) -> None:
    """Send `strata.*` logs to stderr: warnings, with -v information, with -vv everything."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    logger = logging.getLogger("strata")
    logger.setLevel(level)
    logger.handlers = [_LineHandler(console=console, show_time=False, show_path=False)]
    logger.propagate = False


class _LineHandler(RichHandler):
    """Begins a line of its own where the answer on the same terminal is in the middle of one."""

    in_line = False

    def emit(self, record: logging.LogRecord) -> None:
        if _LineHandler.in_line and sys.stdout.isatty():
            write_text("\n")
        super().emit(record)


LEAST_SHOWN = {"bytes": 64 << 20, "tokens": 128, "runs": 1, "lines": 1}


@contextmanager
def progress(title: str, unit: str = "bytes") -> Iterator[Report]:
    """A bar with the time that remains, for work long enough to wait for; yields a function of (done, total)."""
    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(title, total=None)

    def report(done: int, total: int) -> None:
        if total >= LEAST_SHOWN[unit] and not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()


def write_text(text: str) -> None:
    """Put generated text on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
    if text:
        _LineHandler.in_line = not text.endswith("\n")


def write_json(value: Any) -> None:
    """Put one JSON document on stdout; bytes of a file that are no text show as question marks."""
    document = json.dumps(value, ensure_ascii=False, indent=2)
    write_text(document.encode("utf-8", "replace").decode() + "\n")
