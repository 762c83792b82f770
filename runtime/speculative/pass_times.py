"""What a target's pass over n tokens takes, by how much longer it is than a plain pass made beside it.

A machine's speed changes by a third within minutes, and single passes are disturbed; so passes with drafts are compared
with plain ones that were made in turn with them, and with no others: their ratio is the median of the last comparisons.
The speed of the moment is the median of the last passes, each brought to a plain one's time by its ratio. Reads no
clock. Invariant: passes that all become slower by one factor change no ratio.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

KEPT = 5  # values of which the median counts
NEAR = 8  # passes behind each other that are compared with each other
LEAST_PLAIN = 3  # of them plain, for a comparison


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
        self._near: deque[tuple[int, float]] = deque(maxlen=NEAR)

    @property
    def plain_s(self) -> float:
        """Of a pass without drafts, by now."""
        return self._pace.value

    @property
    def is_compared(self) -> bool:
        """Whether enough of the last passes were plain ones, for one with drafts to be held against them."""
        return sum(tokens == self._plain for tokens, _ in self._near) >= LEAST_PLAIN

    def add(self, tokens: int, seconds: float) -> None:
        """Count a pass."""
        self._near.append((tokens, seconds))
        self._pace.add(seconds / self._ratio(tokens))
        if tokens == self._plain and self.is_compared:
            self._compare()

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

    def _compare(self) -> None:
        """Hold passes with drafts against the plain ones among and around them, each once."""
        plain_s = median(seconds for tokens, seconds in self._near if tokens == self._plain)
        for tokens, seconds in self._near:
            if tokens != self._plain:
                ratio = self._ratios.setdefault(tokens, RecentMedian(0.0))
                ratio.add(seconds / plain_s)
        self._near = deque((one for one in self._near if one[0] == self._plain), maxlen=NEAR)
