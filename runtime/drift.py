"""Whether decoding keeps to what was expected of it, and which number of threads is fastest where it does not.

Pure bookkeeping: fed with the seconds that steps took, it reads no clock and changes nothing by itself. Steps of one
watch and of one trial are alike: the same number of sequences, one token each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from planner.figures import figures

WINDOW_TOKENS = 64
TOLERANCE = 0.25  # of the expected speed
TURN_TOKENS = 3  # of a trial with one number of threads; the first is not counted: threads start, caches fill
ROUNDS = 3
WORTH = 0.95  # of the present time a token: less is no reason to change


@dataclass(frozen=True, slots=True)
class Drift:
    """The speed of a window of tokens, too far from the one that was expected."""

    expected_tokens_per_s: float
    measured_tokens_per_s: float

    @property
    def is_slow(self) -> bool:
        """Whether the window was slower than expected."""
        return self.measured_tokens_per_s < self.expected_tokens_per_s

    def __str__(self) -> str:
        share = self.measured_tokens_per_s / self.expected_tokens_per_s - 1
        return (
            f"decoding at {figures(self.measured_tokens_per_s)} tokens/s, {abs(share):.0%} "
            f"{'below' if self.is_slow else 'above'} the expected {figures(self.expected_tokens_per_s)}"
        )


class DriftWatch:
    """Compares every 64 tokens with the expected speed; what was measured is expected from then on.

    So a lasting difference is told once, and again only when the speed changes again. Without an expectation the first
    window makes it.
    """

    def __init__(self, expected_tokens_per_s: float | None = None) -> None:
        self._expected = expected_tokens_per_s
        self._seconds = 0.0
        self._tokens = 0

    def add(self, seconds: float) -> Drift | None:
        """Count one token; the drift where it ends a window that differs by more than a quarter."""
        self._seconds += seconds
        self._tokens += 1
        if self._tokens < WINDOW_TOKENS:
            return None
        measured = self._tokens / max(self._seconds, 1e-9)
        expected = self._expected
        if expected is None or abs(measured / expected - 1) > TOLERANCE:
            self.expect(measured)
            return None if expected is None else Drift(expected, measured)
        self._restart()
        return None

    def expect(self, tokens_per_s: float | None) -> None:
        """Begin a window in which this speed is expected; None: whatever it has."""
        self._expected = tokens_per_s
        self._restart()

    def _restart(self) -> None:
        self._seconds, self._tokens = 0.0, 0


class ThreadTrial:
    """Numbers of threads tried in turns of a few tokens each, so that what else changes meanwhile meets them all.

    `threads` is what the next token shall be computed with; the first candidate is the present number.
    """

    def __init__(self, candidates: Sequence[int]) -> None:
        """ValueError for fewer than two candidates, or one that is given twice."""
        if len(candidates) < 2 or len(set(candidates)) < len(candidates):
            raise ValueError(f"a trial of {list(candidates)} threads")
        self._candidates = tuple(candidates)
        self._seconds: list[float] = []

    @property
    def present(self) -> int:
        """The number of threads before the trial."""
        return self._candidates[0]

    @property
    def done(self) -> bool:
        """Whether every candidate had all of its turns."""
        return len(self._seconds) == ROUNDS * TURN_TOKENS * len(self._candidates)

    @property
    def threads(self) -> int:
        """What the next token is to be computed with; after the trial the fastest."""
        return self.fastest if self.done else self._at(len(self._seconds))

    @property
    def fastest(self) -> int:
        """The number of threads with the least time a token; the present one unless another is worth the change."""
        best = min(self._candidates, key=self.token_seconds)
        return best if self.token_seconds(best) < WORTH * self.token_seconds(self.present) else self.present

    def add(self, seconds: float) -> None:
        """Count a token that was computed with `threads`; ValueError once the trial is done."""
        if self.done:
            raise ValueError("the trial is done")
        self._seconds.append(seconds)

    def restart(self) -> None:
        """Forget what was measured: steps were not alike."""
        self._seconds.clear()

    def token_seconds(self, threads: int) -> float:
        """Median seconds a token with a number of threads; infinite before its first counted token."""
        counted = [
            seconds for index, seconds in enumerate(self._seconds) if index % TURN_TOKENS and self._at(index) == threads
        ]
        return median(counted) if counted else float("inf")

    def _at(self, index: int) -> int:
        """The candidate whose turn has the trial's token number `index`."""
        return self._candidates[index // TURN_TOKENS % len(self._candidates)]


def other_threads(present: int, planned: int) -> tuple[int, ...]:
    """Numbers of threads worth a trial beside the present one: the planned, one less, half, a single one."""
    wanted = (planned, present - 1, present // 2, 1)
    return tuple(dict.fromkeys(number for number in wanted if number >= 1 and number != present))
