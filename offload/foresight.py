"""Reads on a guess of what the next layer uses: how many are worth a try, and how often the guesses came true.

Knows nothing about slots or about who guesses. After the warnings of systems that read ahead from saturated drives
(design of the expert cache): a guess must never cost what is worth more than it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.expert_load import Load

# For a layer, where all come true. They keep the drive busy from a layer's last read to the next one's first: with
# OLMoE-1B-7B Q4_0 and slots for a third of its experts (3.5 MB each, drive of 4 GB/s) 9.0 tokens/s became 9.5, 10.1,
# 10.5, 10.2 and 9.3 with 1, 2, 3, 4 and 8 of them.
MOST_GUESSES = 3


class Foresight:
    """Counts of the experts that were foreseen."""

    def __init__(self) -> None:
        self.foreseen = self.settled = self.used = 0
        self.wasted_bytes = 0
        self._open: dict[int, list[Load]] = {}  # by layer: what its next look-up settles

    @property
    def precision(self) -> float:
        """How often guesses come true, by what was seen so far."""
        return (self.used + 1) / (self.settled + 2)

    @property
    def most(self) -> int:
        """Experts that may be foreseen for a layer."""
        return max(1, round(MOST_GUESSES * self.precision))

    def worth(self, value: Any, most: Any) -> Any:
        """Of experts that a policy gives `value` when it knows of no guess; `most`: what it gives the best resident.

        That of what is needed for sure, as often as guesses come true, else the policy's own.
        """
        return self.precision * most + (1 - self.precision) * value

    def begun(self, layer: int, loads: Sequence[Load]) -> None:
        """These are read on a guess that the layer uses them."""
        self.foreseen += len(loads)
        self._open.setdefault(layer, []).extend(loads)

    def settle(self, layer: int, is_used: NDArray[np.bool_]) -> None:
        """The layer uses these experts (experts,); reads for others that had not begun are cancelled already."""
        for load in self._open.pop(layer, ()):
            came_true = bool(is_used[load.expert])
            self.settled += 1
            self.used += came_true
            self.wasted_bytes += 0 if came_true else load.num_bytes

    def forget(self) -> None:
        """What has not been settled never will be."""
        self._open.clear()
