"""Stop strings: cutting a stream of text where one of several strings begins.

Knows nothing about tokens or models. Invariant: whatever the pieces, all that is emitted, joined, equals the whole text
cut at the earliest start of any stop string; no character of a stop string is ever emitted, and what is held back is
shorter than the longest of them. Where several begin at the same character the shortest is the one `matched`.
"""

from collections.abc import Sequence

from offload.errors import RequestError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256


class StopStrings:
    """The filter of one stream."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = checked_stops(stops)
        self.matched: str | None = None
        self._held = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: nothing more will be emitted."""
        return self.matched is not None

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return what may be shown by now, and whether the stream has stopped.

        A stop string that is complete waits while one that began before it may still be completed.
        """
        if self.stopped:
            return "", True
        text = self._held + text
        found = self._first_match(text)
        pending = min((_partial_start(text, stop) for stop in self.stops), default=len(text))
        if found is not None and found[0] <= pending:
            return self._stop(text, *found), True
        self._held = text[pending:]
        return text[:pending], False

    def flush(self) -> str:
        """What was held back, now that the text is over; it may turn out to have stopped after all."""
        if self.stopped:
            return ""
        found = self._first_match(self._held)
        if found is not None:
            return self._stop(self._held, *found)
        text, self._held = self._held, ""
        return text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Where the earliest stop string begins in `text`, and which it is."""
        found = [(start, len(stop), stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        start, _, stop = min(found)
        return start, stop

    def _stop(self, text: str, start: int, stop: str) -> str:
        """Note the match and return the text before it."""
        self.matched = stop
        self._held = ""
        return text[:start]


def checked_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """`stops` as a tuple; `RequestError` where there are too many, or one is empty, too long, or no string."""
    if isinstance(stops, str) or not isinstance(stops, Sequence):
        raise RequestError("stop strings must be given as a list of strings")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"{len(stops)} stop strings were given; at most {MAX_STOPS} are allowed")
    for stop in stops:
        if not isinstance(stop, str):
            raise RequestError(f"a stop string must be a string, not a {type(stop).__name__}")
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise RequestError(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(stop)}")
    return tuple(stops)


def _partial_start(text: str, stop: str) -> int:
    """Where the longest tail of `text` begins that is the beginning, but not all, of `stop`; `len(text)` if none."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return start if start >= 0 else len(text)
