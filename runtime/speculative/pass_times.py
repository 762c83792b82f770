"""What a target's pass over n tokens takes, by how much longer it is than the plain passes made before and after it.

A machine's speed changes by a third within minutes, and single passes are disturbed; so passes with drafts are compared
with plain ones beside them alone, where both of these took about as long, and their ratio is the median of the last
comparisons. The speed of the moment is the median of the last passes, each brought to a plain one's time by its ratio.
Reads no clock. Invariant: a speed that changes between comparisons changes no ratio.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

KEPT = 5  # values of which the median counts
NEAR = 5  # passes between two plain ones, at most, for a comparison
ALIKE = 1.25  # times as long as the other: what two plain passes may take for the machine's speed to be the same


@dataclass(slots=True)
class RecentMedian:
    """The median of the last measurements; what was expected before there are some."""

    expected: float
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, value: float) -> None:
        """Count a measurement."""
        self._last.append(value)

    @property
    def measurements(self) -> int:
        """How many count."""
        return len(self._last)

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
        self._last_plain_s = 0.0
        self._since_plain: list[tuple[int, float]] = []

    @property
    def plain_s(self) -> float:
        """Of a pass without drafts, by now."""
        return self._pace.value

    def add(self, tokens: int, seconds: float) -> None:
        """Count a pass."""
        self._pace.add(seconds / self._ratio(tokens))
        if tokens != self._plain:
            self._since_plain.append((tokens, seconds))
            return
        less, more = sorted((self._last_plain_s, seconds))
        if len(self._since_plain) <= NEAR and more <= ALIKE * less:
            self._compare((less + more) / 2)
        self._since_plain.clear()
        self._last_plain_s = seconds

    def seconds(self, tokens: int) -> float:
        """Of a pass over so many tokens."""
        return self.plain_s * self._ratio(tokens)

    def _ratio(self, tokens: int) -> float:
        """To a plain pass: as expected, times what comparisons of about as many tokens ask for."""
        if tokens in self._ratios:
            return self._ratios[tokens].value
        expected = self.expected(tokens) / self.expected(self._plain)
        sizes = sorted({self._plain, *self._ratios})
        place = bisect_left(sizes, tokens)
        below, above = sizes[max(place - 1, 0)], sizes[min(place, len(sizes) - 1)]
        share = (tokens - below) / (above - below) if above > below else 0.0
        return expected * ((1 - share) * self._correction(below) + share * self._correction(above))

    def _correction(self, tokens: int) -> float:
        """The ratio of passes over so many tokens, which are plain or were compared, to the expected one."""
        if tokens == self._plain:
            return 1.0
        return self._ratios[tokens].value * self.expected(self._plain) / self.expected(tokens)

    def _compare(self, plain_s: float) -> None:
        """Hold the passes since the last plain one against it and the one that was just made."""
        for size in {tokens for tokens, _ in self._since_plain}:
            seconds = median(each for tokens, each in self._since_plain if tokens == size)
            self._ratios.setdefault(size, RecentMedian(0.0)).add(seconds / plain_s)
