"""What a target's pass over n tokens takes, by how much longer it is than the plain passes made before and after it.

A machine's speed changes by a third within minutes, and single passes are disturbed; so passes with drafts are compared
with the quicker of the two plain ones beside them alone, and their ratio is the median of the last comparisons. The
speed of the moment is the median of the last plain passes and of others, brought to a plain one's time by a ratio that
was measured. Reads no clock. Invariants: a speed that changes between comparisons changes no ratio; more tokens never
take less time.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

KEPT = 5  # values of which the median counts
NEAR = 5  # passes between two plain ones, at most, for a comparison


@dataclass(slots=True)
class RecentMedian:
    """The median of the last measurements; what was expected before there are some."""

    expected: float
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, value: float) -> None:
        """Count a measurement."""
        self._last.append(value)

    @property
    def value(self) -> float:
        """The lower one of two in the middle: what disturbs a measurement makes it longer."""
        return sorted(self._last)[(len(self._last) - 1) // 2] if self._last else self.expected


class PassTimes:
    """Seconds of passes over n tokens, `plain` of them without drafts; `expected` (by n) where none was made."""

    def __init__(self, expected: Callable[[int], float], plain: int = 1) -> None:
        self.expected = expected
        self._plain = plain
        self._pace = RecentMedian(expected(plain))
        self._ratios: dict[int, RecentMedian] = {}
        self._sizes = [plain]  # that a ratio is known for
        self._last_plain_s = 0.0
        self._since_plain: list[tuple[int, float]] = []

    @property
    def plain_s(self) -> float:
        """Of a pass without drafts, by now."""
        return self._pace.value

    def add(self, tokens: int, seconds: float) -> None:
        """Count a pass."""
        if tokens in self._sizes:
            self._pace.add(seconds / self._ratio(tokens))
        if tokens != self._plain:
            self._since_plain.append((tokens, seconds))
            return
        if self._last_plain_s and len(self._since_plain) <= NEAR:
            self._compare(min(self._last_plain_s, seconds))
        self._since_plain.clear()
        self._last_plain_s = seconds

    def seconds(self, tokens: int) -> float:
        """Of a pass over so many tokens."""
        return self.plain_s * self._ratio(tokens)

    def _ratio(self, tokens: int) -> float:
        """To a plain pass: as expected, times what comparisons of about as many tokens ask for."""
        sizes = self._sizes
        place = bisect_left(sizes, tokens)
        below, above = sizes[max(place - 1, 0)], sizes[min(place, len(sizes) - 1)]
        if above == tokens:
            return self._measured(tokens)
        share = (tokens - below) / (above - below) if above > below else 0.0
        correction = (1 - share) * self._correction(below) + share * self._correction(above)
        found = max(self.expected(tokens) / self.expected(self._plain) * correction, self._measured(below))
        return min(found, self._measured(above)) if above > tokens else found

    def _measured(self, tokens: int) -> float:
        """The ratio of passes over so many tokens, which are plain or were compared."""
        return 1.0 if tokens == self._plain else max(self._ratios[tokens].value, 1.0)

    def _correction(self, tokens: int) -> float:
        """What is measured of them, to what was expected."""
        return self._measured(tokens) * self.expected(self._plain) / self.expected(tokens)

    def _compare(self, plain_s: float) -> None:
        """Hold the passes since the last plain one against the quicker, `plain_s`, of it and the one just made."""
        for size in {tokens for tokens, _ in self._since_plain}:
            seconds = median(each for tokens, each in self._since_plain if tokens == size)
            if size not in self._ratios:
                self._ratios[size] = RecentMedian(self._ratio(size))
                insort(self._sizes, size)
            self._ratios[size].add(seconds / plain_s)
