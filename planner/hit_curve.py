"""How many of the experts that tokens use are found in memory, as a function of how many slots there are.

From the replays of a recorded trace, or, without one, from an assumed popularity. Pure functions; knows nothing about
where slots are or what a miss costs.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Points of a curve, both rising, from no slots to a slot for every expert."""

    slots: tuple[int, ...]
    hit_rates: tuple[float, ...]
    is_traced: bool  # or assumed

    def hit_rate(self, slots: float) -> float:
        """The share of lookups that hit with this many slots, by straight lines between the points."""
        if slots <= self.slots[0]:
            return self.hit_rates[0]
        if slots >= self.slots[-1]:
            return self.hit_rates[-1]
        right = bisect_right(self.slots, slots)
        part = (slots - self.slots[right - 1]) / (self.slots[right] - self.slots[right - 1])
        return self.hit_rates[right - 1] + part * (self.hit_rates[right] - self.hit_rates[right - 1])


def traced_curve(points: Iterable[tuple[int, float]], all_slots: int) -> HitCurve:
    """The curve through a trace's (slots, hit rate), as `offload.trace_replay.hit_curve` gives them.

    Without slots nothing hits, with a slot for each of `all_slots` experts everything (once they are loaded); where a
    policy hits less with more slots, the better figure of fewer slots stands.
    """
    between = sorted((slots, rate) for slots, rate in points if 0 < slots < all_slots)
    rates = accumulate((rate for _, rate in between), max)
    return HitCurve((0, *(slots for slots, _ in between), all_slots), (0.0, *rates, 1.0), is_traced=True)


def assumed_curve(layers: int, experts: int, used: int, *, popularity_exponent: float) -> HitCurve:
    """The curve of a cache that holds each layer's most popular experts, as a good policy comes to do.

    A token uses `used` of a layer's `experts`; the one of rank r in proportion to (r + 1) ** -popularity_exponent,
    though never with a probability above 1. `layers` layers share the slots evenly.
    """
    if layers < 1 or not 0 < used <= experts:
        raise ValueError(f"{layers} layers with {used} of {experts} experts used")
    hits = [0.0, *accumulate(_probabilities(experts, used, popularity_exponent))]
    return HitCurve(
        tuple(layers * held for held in range(experts + 1)),
        tuple(min(hit / used, 1.0) for hit in hits),
        is_traced=False,
    )


def _probabilities(experts: int, used: int, exponent: float) -> Iterator[float]:
    """Of each expert's use by a token, by falling popularity: their sum is `used`, none is above 1."""
    weights = [(rank + 1) ** -exponent for rank in range(experts)]
    left, weight_left = float(used), sum(weights)
    for weight in weights:
        probability = min(left * weight / weight_left, 1.0)  # what is cut off goes to the others
        yield probability
        left -= probability
        weight_left -= weight
