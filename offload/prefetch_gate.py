"""Whether experts are read ahead on a guess: tried at run time against not doing it, and kept only where it is faster.

A guess that is right saves a wait, one that is wrong takes the drive's time from reads that are needed; which of the
two weighs more depends on drive, model and cache. A trial compares windows of tokens, in an order that a steady drift
does not favor; the winner stays for a while, then comes the next trial. Knows nothing about reads; who uses it says
how long each token took. Invariant: before its first trial is won, the gate is open in windows of a trial only.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

log = logging.getLogger("strata.experts")

WINDOW_TOKENS = 16
WINDOWS = (False, True, True, False)  # of a trial: open or not
SETTLING_TOKENS = 2  # at the start of a window: not counted
KEPT_TOKENS = 256  # between trials
NOISE_DEVIATIONS = 1.0  # standard errors that a gain must exceed: a trial that errs by as much costs little
_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_MEDIAN = 1.2533  # standard error of its median over that of its mean


class PrefetchMode(StrEnum):
    """Never, always, or where trials say so."""

    OFF = "off"
    ON = "on"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Trial:
    """Typical seconds of a token with the gate open and closed, and the standard error of their difference."""

    open_s: float
    closed_s: float
    noise_s: float

    @property
    def is_won(self) -> bool:
        """Whether tokens are quicker with the gate open, by more than chance explains."""
        return self.closed_s - self.open_s > self.noise_s

    def __str__(self) -> str:
        times = (1e3 * self.open_s, 1e3 * self.closed_s, 1e3 * self.noise_s)
        return "{:.2f} ms a token with it, {:.2f} without (noise {:.2f})".format(*times)


class PrefetchGate:
    """Told how long tokens took, says whether to read ahead for the next one."""

    def __init__(self, mode: PrefetchMode = PrefetchMode.AUTO) -> None:
        self.mode = mode
        self.is_open = mode is PrefetchMode.ON
        self.newest: Trial | None = None
        self._tokens = 0  # since the trial began
        self._window = 0  # of the trial; len(WINDOWS): it is over
        self._taken: dict[bool, list[float]] = {False: [], True: []}

    def token_took(self, seconds: float) -> None:
        """A token, or one of each of some sequences at once, was decoded in so many seconds, a sequence's share."""
        if self.mode is not PrefetchMode.AUTO:
            return
        if self._window < len(WINDOWS) and self._tokens % WINDOW_TOKENS >= SETTLING_TOKENS:
            self._taken[self.is_open].append(seconds)
        self._tokens += 1
        trial_tokens = len(WINDOWS) * WINDOW_TOKENS
        if self._tokens == trial_tokens:
            self._decide()
        elif self._tokens == trial_tokens + KEPT_TOKENS:
            self._tokens = 0
        self._window = min(self._tokens // WINDOW_TOKENS, len(WINDOWS))
        self.is_open = self._has_won if self._window == len(WINDOWS) else WINDOWS[self._window]

    @property
    def _has_won(self) -> bool:
        return self.newest is not None and self.newest.is_won

    def _decide(self) -> None:
        """The end of a trial."""
        closed, opened = (_typical(self._taken[is_open]) for is_open in (False, True))
        noise_s = NOISE_DEVIATIONS * (closed[1] ** 2 + opened[1] ** 2) ** 0.5
        had_won = self._has_won
        self.newest = Trial(opened[0], closed[0], noise_s)
        if self._has_won is not had_won:
            log.info("reading experts ahead is %s: %s", "on" if self._has_won else "off", self.newest)
        self._taken = {False: [], True: []}


def _typical(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, which single hiccups do not move, and its standard error."""
    middle = median(seconds)
    deviation = _NORMAL * median(abs(value - middle) for value in seconds)
    return middle, _MEDIAN * deviation / len(seconds) ** 0.5
