"""Sines and cosines of rotary positions, with every scaling that `Rope` describes.

Knows nothing about heads or where a position comes from. Angles are computed in float64, tables are float32.
"""

import math

import numpy as np
from numpy.typing import NDArray

from runtime.architectures.base import Rope, RopeScaling

FIRST_POSITIONS = 256
MORE_POSITIONS = 8192  # at most ahead of what is asked for
AT_ONCE = 1024  # in float64, so that little memory is taken besides the table


class RotaryTable:
    """The table of one `Rope`, made as far as positions were asked for."""

    def __init__(self, rope: Rope, factors: NDArray[np.float32] | None = None) -> None:
        """`factors`: divisors of the angles, (pairs,), or None."""
        angles = frequencies(rope)
        if factors is not None:
            angles = angles / factors.astype(np.float64)
        self._angles = scaled(angles, rope)
        self._magnitude = magnitude(rope)
        self._cos = self._sin = np.empty((0, len(angles)), np.float32)

    @property
    def positions(self) -> int:
        """How many are made."""
        return len(self._cos)

    def at(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(cosines, sines) of positions start to stop - 1, each (stop - start, pairs)."""
        known = len(self._cos)
        if stop > known:
            rows = max(stop, min(2 * known, known + MORE_POSITIONS), FIRST_POSITIONS)
            tables = [np.empty((rows, len(self._angles)), np.float32) for _ in range(2)]
            for table, before, wave in zip(tables, (self._cos, self._sin), (np.cos, np.sin), strict=True):
                table[:known] = before
                for first in range(known, rows, AT_ONCE):
                    end = min(first + AT_ONCE, rows)
                    turned = np.arange(first, end, dtype=np.float64)[:, None] * self._angles
                    table[first:end] = wave(turned) * self._magnitude
            self._cos, self._sin = tables
        return self._cos[start:stop], self._sin[start:stop]


def frequencies(rope: Rope) -> NDArray[np.float64]:
    """Unscaled angles of position 1: freq_base^(-2i / dimension_count), (pairs,) float64 (arXiv:2104.09864)."""
    pairs = np.arange(rope.dimension_count // 2, dtype=np.float64)
    return np.power(rope.freq_base, -2.0 * pairs / rope.dimension_count)


def scaled(angles: NDArray[np.float64], rope: Rope) -> NDArray[np.float64]:
    """The angles of position 1 after scaling; YARN as arXiv:2309.00071, section 3.2, with whole pairs as limits."""
    if rope.scaling is not RopeScaling.YARN:
        return angles / rope.factor
    low = max(0, math.floor(_pair_of_turns(rope, rope.beta_fast)))
    high = min(rope.dimension_count - 1, math.ceil(_pair_of_turns(rope, rope.beta_slow)))
    pairs = np.arange(len(angles), dtype=np.float64)
    kept = 1.0 - ((pairs - low) / max(0.001, high - low)).clip(0.0, 1.0)
    return angles / rope.factor * (1.0 - kept) + angles * kept


def magnitude(rope: Rope) -> float:
    """What multiplies sines and cosines."""
    if rope.scaling is RopeScaling.YARN and rope.factor > 1.0:
        return rope.attn_factor * (1.0 + 0.1 * math.log(rope.factor))
    return rope.attn_factor


def _pair_of_turns(rope: Rope, turns: float) -> float:
    """The (fractional) pair that turns so many times over the original context."""
    wavelength = rope.original_context_length / (turns * 2 * math.pi)
    return rope.dimension_count * math.log(wavelength) / (2 * math.log(rope.freq_base))
