"""Sines and cosines of rotary positions, with every scaling that `Rope` describes.

Knows nothing about heads or where a position comes from. Angles are computed in float64, tables are float32.
"""

import math

import torch

from runtime.architectures.base import Rope, RopeScaling

FIRST_POSITIONS = 256


class RotaryTable:
    """The table of one `Rope`, made as far as positions were asked for."""

    def __init__(self, rope: Rope, factors: torch.Tensor | None, device: torch.device) -> None:
        """`factors`: divisors of the angles, (pairs,), or None."""
        angles = frequencies(rope)
        if factors is not None:
            angles = angles / factors.double().cpu()
        self._angles = scaled(angles, rope)
        self._magnitude = magnitude(rope)
        self._device = device
        self._cos = self._sin = torch.empty((0, 1, len(angles)), device=device)

    def at(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, sines) of positions start to stop - 1, each (stop - start, 1, pairs)."""
        if stop > len(self._cos):
            known = len(self._cos)
            rows = max(stop, 2 * known, FIRST_POSITIONS)
            turned = torch.arange(known, rows, dtype=torch.float64)[:, None, None] * self._angles
            self._cos = torch.cat((self._cos, (turned.cos() * self._magnitude).float().to(self._device)))
            self._sin = torch.cat((self._sin, (turned.sin() * self._magnitude).float().to(self._device)))
        return self._cos[start:stop], self._sin[start:stop]


def frequencies(rope: Rope) -> torch.Tensor:
    """Unscaled angles of position 1: freq_base^(-2i / dimension_count), (pairs,) float64 (arXiv:2104.09864)."""
    pairs = torch.arange(rope.dimension_count // 2, dtype=torch.float64)
    return rope.freq_base ** (-2.0 * pairs / rope.dimension_count)


def scaled(angles: torch.Tensor, rope: Rope) -> torch.Tensor:
    """The angles of position 1 after scaling; YARN as arXiv:2309.00071, section 3.2, with whole pairs as limits."""
    if rope.scaling is not RopeScaling.YARN:
        return angles / rope.factor
    low = max(0, math.floor(_pair_of_turns(rope, rope.beta_fast)))
    high = min(rope.dimension_count - 1, math.ceil(_pair_of_turns(rope, rope.beta_slow)))
    pairs = torch.arange(len(angles), dtype=torch.float64)
    kept = 1.0 - ((pairs - low) / max(0.001, high - low)).clamp(0.0, 1.0)
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
