"""Reads on a guess of what the next layer uses: how many are worth a try, and how often the guesses came true.

As many experts are guessed for a layer as the drive brings in the time that reads which are needed leave it, but at
least one. Knows nothing about slots or about who guesses. After the warnings of systems that read ahead from saturated
drives (design of the expert cache): a guess must never cost what is worth more than it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

NEWEST_SHARE = 1 / 16  # of the newest run in the averages


class Foresight:
    """Counts of the experts that were foreseen, of `expert_bytes` each at most, for a step of `layers` layers."""

    def __init__(self, layers: int, expert_bytes: int) -> None:
        self.foreseen = self.used = self.settled = 0
        self.num_bytes = self.wasted_bytes = 0
        self._layers, self._expert_bytes = layers, expert_bytes
        self._seen = np.zeros(4)
        self._averages: NDArray[np.float64] | None = None  # of a run: seconds, seconds busy, bytes, bytes foreseen

    @property
    def most(self) -> int:
        """Experts that may be foreseen for a layer."""
        if self._averages is None or not self._averages[1] or not self._averages[2]:
            return 1
        seconds, busy_s, num_bytes, foreseen = self._averages
        possible = seconds * num_bytes / busy_s
        return max(1, int((possible - (num_bytes - foreseen)) / self._layers / self._expert_bytes))

    def worth(self, value: Any, most: Any) -> Any:
        """Of experts that a policy gives `value` when it knows of no guess; `most`: what it gives the best resident.

        That of what is needed for sure, as often as guesses come true, else the policy's own.
        """
        precision = (self.used + 1) / (self.settled + 2)
        return precision * most + (1 - precision) * value

    def settle(self, num_bytes: int, *, is_used: bool) -> None:
        """Whether a guess came true; `num_bytes` were read for it."""
        self.settled += 1
        self.used += is_used
        self.wasted_bytes += 0 if is_used else num_bytes

    def run_took(self, seconds: float, busy_s: float, num_bytes: int) -> None:
        """A decode run is over; the drive was busy so long, and brought so much, since the start."""
        total = np.array([self._seen[0] + seconds, busy_s, num_bytes, self.num_bytes])
        newest, self._seen = total - self._seen, total
        if self._averages is None:
            self._averages = newest  # may have what came before the first run in it: fades
        else:
            self._averages += NEWEST_SHARE * (newest - self._averages)
