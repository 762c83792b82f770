"""What runs teach a profile: how far predictions were off, and how often a model's experts were found in RAM.

Knows nothing about plans: what is learned is kept by keys that the caller makes.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import exp, log
from pathlib import Path

from planner.prediction import Residual
from planner.profile import Profile, save

MOST_HIT_POINTS = 16  # of one model
RESIDUAL_LIMITS = (0.2, 5.0)
_RESIDUAL_WEIGHT = 0.5  # of the newest run, once there are two or more


def record_observation(
    profile: Profile, keys: Iterable[str], *, predicted_s: float, measured_s: float, path: Path | None = None
) -> Profile:
    """Fold one run into the corrections under `keys` and store them.

    `predicted_s` is the prediction *without* correction, per token. The average is geometric, its newest run weighing
    half, and bounded to 0.2..5: one disturbed run must not spoil the next plans.
    """
    if not (predicted_s > 0 and measured_s > 0):
        raise ValueError(f"times must be positive, not {predicted_s} s predicted and {measured_s} s measured")
    low, high = RESIDUAL_LIMITS
    newest = min(max(measured_s / predicted_s, low), high)
    residuals = dict(profile.residuals)
    for key in keys:
        old = residuals.get(key, Residual(newest, 0))
        factor = exp((1 - _RESIDUAL_WEIGHT) * log(old.factor) + _RESIDUAL_WEIGHT * log(newest))
        residuals[key] = Residual(min(max(factor, low), high), old.runs + 1)
    profile = replace(profile, residuals=residuals)
    save(profile, path)
    return profile


def record_hits(profile: Profile, model: str, slots: int, hit_rate: float, path: Path | None = None) -> Profile:
    """Keep how often a run found a model's experts in so many slots, in place of what was known for as many."""
    others = (point for point in profile.hits.get(model, ()) if point[0] != slots)
    points = tuple(sorted((*others, (slots, hit_rate)))[-MOST_HIT_POINTS:])
    profile = replace(profile, hits={**profile.hits, model: points})
    save(profile, path)
    return profile
