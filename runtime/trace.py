"""What an engine did when, for chrome://tracing or Perfetto: a lane for each kind of work.

Format: "Trace Event Format", Google, object form with `traceEvents`, times in microseconds. Knows nothing of what the
work is. Invariant: times are seconds of `time.perf_counter`, as everywhere in the runtime.
"""

import json
import threading
from dataclasses import dataclass
from pathlib import Path

from offload.errors import RequestError


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time, and numbers that belong to it."""

    lane: str
    name: str
    start_s: float
    end_s: float
    numbers: dict[str, float]


class Trace:
    """Spans and counts that are collected until they are written; for several threads at once."""

    def __init__(self, path: Path) -> None:
        """`path`: of the file that is made now; RequestError where it cannot be."""
        self._path = path
        self._write("")
        self._spans: list[Span] = []
        self._counts: list[tuple[str, float, float]] = []
        self._lock = threading.Lock()

    def add(self, lane: str, name: str, start_s: float, end_s: float, **numbers: float) -> None:
        """A lane worked on something."""
        with self._lock:
            self._spans.append(Span(lane, name, start_s, end_s, numbers))

    def count(self, name: str, at_s: float, value: float) -> None:
        """A number that changes, as it is from then on."""
        with self._lock:
            self._counts.append((name, at_s, value))

    def events(self) -> list[dict[str, object]]:
        """The events, the first of which begins at 0; lanes in the order in which they came to work."""
        with self._lock:
            spans, counts = list(self._spans), list(self._counts)
        origin = min([span.start_s for span in spans] + [at_s for _, at_s, _ in counts], default=0.0)
        numbers = {lane: number for number, lane in enumerate(dict.fromkeys(span.lane for span in spans))}
        names: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}}
            for lane, number in numbers.items()
        ]
        done: list[dict[str, object]] = [
            {
                **{"ph": "X", "name": span.name, "cat": span.lane, "pid": 1, "tid": numbers[span.lane]},
                **{"ts": 1e6 * (span.start_s - origin), "dur": 1e6 * (span.end_s - span.start_s)},
                "args": span.numbers,
            }
            for span in spans
        ]
        counted: list[dict[str, object]] = [
            {"ph": "C", "name": name, "pid": 1, "ts": 1e6 * (at_s - origin), "args": {name: value}}
            for name, at_s, value in counts
        ]
        return names + done + counted

    def write(self) -> None:
        """To the file; RequestError where it cannot be written."""
        self._write(json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"}, allow_nan=False))

    def _write(self, text: str) -> None:
        try:
            self._path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{self._path}: the trace cannot be written: {error.strerror}") from error
