"""How many of a token's experts each layer finds on the GPU, as chance has it: a layer waits for the slower device.

What a device takes for the mean of the hits is less than what a layer takes in the mean, so a step is told with layers
that differ as they do in a run. Pure functions; knows nothing about time.
"""

from collections.abc import Iterator
from itertools import accumulate
from math import comb


def spread_hits(used: int, rate: float, layers: int) -> tuple[float, ...]:
    """Of `used` experts, what is found in each of `layers` layers, rising; their mean is used x rate.

    The binomial distribution cut into as many equal parts, of each its mean.
    """
    if layers < 1 or not 0 <= rate <= 1:
        raise ValueError(f"{layers} layers with a hit rate of {rate}")
    chances = [comb(used, found) * rate**found * (1 - rate) ** (used - found) for found in range(used + 1)]
    return tuple(_means(chances, layers))


def _means(chances: list[float], parts: int) -> Iterator[float]:
    ends = [*accumulate(chances)]
    ends[-1] = 1.0
    starts = [0.0, *ends[:-1]]
    for part in range(parts):
        low, high = part / parts, (part + 1) / parts
        overlaps = (max(min(end, high) - max(start, low), 0.0) for start, end in zip(starts, ends, strict=True))
        mean = parts * sum(number * overlap for number, overlap in enumerate(overlaps))
        yield min(round(mean, 9), len(chances) - 1)
