"""What is known of drafts from those that were verified: chances by position and by a source's confidence, and times.

Pure bookkeeping: fed with what happened, it reads no clock. Invariant: estimates start at what was expected, and what
lies further back counts less.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

FIRST = 3
OUTLIER = 3.0  # times the mean: what a measurement counts as at most
NEW_SHARE = 0.2  # of a new measurement in a running mean
KEPT = 0.95  # of earlier evidence, at each new one
PRIOR_WEIGHT = 4.0  # an expectation counts as so many observations
SLOPE = 0.5  # width of a bin of confidence, in units of its logit
BINS = 8  # on each side of a confidence of one half
LEAST_SEEN = 16.0  # observations, from which an acceptance is told
EXPECTED_SHARE = 0.75  # of a source's confidence, before any was put to the test


Origin = tuple[str, int]
"""A source's name, and the rank of its choice."""


@dataclass(slots=True)
class RunningMean:
    """A mean that follows change; a measurement far above it counts for a part.

    The first one replaces what was expected, and of the first three the least counts: what disturbs a measurement makes
    it longer.
    """

    value: float
    measurements: int = 0

    def add(self, value: float) -> None:
        """Count a measurement."""
        self.measurements += 1
        if self.measurements == 1:
            self.value = value
        elif self.measurements <= FIRST:
            self.value = min(self.value, value)
        else:
            self.value += NEW_SHARE * (min(value, OUTLIER * self.value) - self.value)


@dataclass(slots=True)
class Chance:
    """How often something was right; `expected` until there is evidence."""

    expected: float
    right: float = 0.0
    seen: float = 0.0

    def add(self, *, right: bool) -> None:
        """Count one."""
        self.right = KEPT * self.right + right
        self.seen = KEPT * self.seen + 1.0

    @property
    def value(self) -> float:
        """In (0, 1)."""
        return (self.right + PRIOR_WEIGHT * self.expected) / (self.seen + PRIOR_WEIGHT)


class Calibration:
    """From a source's confidence in a token to the chance that the target agrees, in bins of the confidence's logit."""

    def __init__(self) -> None:
        self._bins: dict[tuple[Origin, int], Chance] = {}

    def chance(self, source: Origin, confidence: float) -> float:
        """That a candidate is right, if those before it are."""
        return self._bin(source, confidence).value

    def add(self, source: Origin, confidence: float, *, right: bool) -> None:
        """Count a candidate that was put to the test."""
        self._bin(source, confidence).add(right=right)

    def _bin(self, source: Origin, confidence: float) -> Chance:
        bounded = min(max(confidence, 1e-6), 1 - 1e-6)
        place = round(math.log(bounded / (1 - bounded)) / SLOPE)
        key = source, max(-BINS, min(BINS, place))
        if key not in self._bins:
            middle = 1 / (1 + math.exp(-SLOPE * key[1]))
            self._bins[key] = Chance(middle if source[1] else EXPECTED_SHARE * middle)
        return self._bins[key]


class Acceptance:
    """Chance that the draft at a position is right if those before it are: of each position, with decay."""

    def __init__(self, expected: float, most: int) -> None:
        """ValueError unless `expected` is in [0, 1]."""
        if not 0.0 <= expected <= 1.0:
            raise ValueError(f"an expected acceptance of {expected}")
        self._chances = [Chance(expected) for _ in range(most)]

    def chances(self, count: int) -> list[float]:
        """Of the first `count` positions; where few drafts came that far, mostly that of the position before."""
        found: list[float] = []
        value = self._chances[0].expected
        for chance in self._chances[:count]:
            value = (chance.right + PRIOR_WEIGHT * value) / (chance.seen + PRIOR_WEIGHT)
            found.append(value)
        return found

    @property
    def measured(self) -> float | None:
        """Of all positions together, without what was expected; None where too few were put to the test."""
        seen = sum(chance.seen for chance in self._chances)
        return sum(chance.right for chance in self._chances) / seen if seen >= LEAST_SEEN else None

    def add(self, position: int, *, right: bool) -> None:
        """Count a draft that was put to the test, those before it being right."""
        if position < len(self._chances):
            self._chances[position].add(right=right)


class Ranks:
    """Chance that a source's second, third, ... choice is right where those before it are wrong."""

    def __init__(self, expected: Sequence[float]) -> None:
        self._chances = [Chance(chance) for chance in expected]

    def chances(self) -> list[float]:
        """Of each rank from the second on."""
        return [chance.value for chance in self._chances]

    def add(self, rank: int, *, right: bool) -> None:
        """Count one that was put to the test; 1 is the second choice."""
        self._chances[rank - 1].add(right=right)


@dataclass(slots=True)
class PassTimes:
    """Seconds of a target's pass over n tokens: as `expected`, times what measurements of about as many ask for."""

    expected: Callable[[int], float]
    _measured: dict[int, RunningMean] = field(default_factory=dict)
    _sizes: list[int] = field(default_factory=list)

    def add(self, tokens: int, seconds: float) -> None:
        """Count a pass."""
        if tokens not in self._measured:
            self._measured[tokens] = RunningMean(seconds)
            self._sizes = sorted(self._measured)
        self._measured[tokens].add(seconds)

    def measurements(self, tokens: int) -> int:
        """Passes over as many tokens that were measured."""
        return self._measured[tokens].measurements if tokens in self._measured else 0

    def seconds(self, tokens: int) -> float:
        """Of a pass over so many tokens; never less than over fewer that were measured next to it."""
        if tokens in self._measured:
            return self._measured[tokens].value
        if not self._sizes:
            return self.expected(tokens)
        place = bisect_left(self._sizes, tokens)
        below = self._sizes[max(place - 1, 0)]
        above = self._sizes[min(place, len(self._sizes) - 1)]
        share = (tokens - below) / (above - below) if above > below else 0.0
        ratio = (1 - share) * self._ratio(below) + share * self._ratio(above)
        return self.expected(tokens) * ratio

    def _ratio(self, tokens: int) -> float:
        return self._measured[tokens].value / self.expected(tokens)
