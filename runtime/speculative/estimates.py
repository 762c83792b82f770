"""What is known of drafts from those that were verified: chances by position and by a source's confidence.

Pure bookkeeping, fed with what happened. Invariant: estimates start at what was expected, and what lies further back
counts less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

KEPT = 0.95  # of earlier evidence, at each new one
PRIOR_WEIGHT = 4.0  # an expectation counts as so many observations
SLOPE = 0.5  # width of a bin of confidence, in units of its logit
BINS = 8  # on each side of a confidence of one half
LEAST_SEEN = 16.0  # observations, from which an acceptance is told
EXPECTED_SHARE = 0.75  # of a source's confidence, before any was put to the test


Origin = tuple[str, int]
"""A source's name, and the rank of its choice."""


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
