"""Hits of layers as chance has them: the mean is kept, and they differ as a binomial distribution does."""

from statistics import fmean, pvariance

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.hybrid_draws import spread_hits


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 16), st.floats(0, 1), st.integers(1, 100))
def test_the_mean_is_kept(used: int, rate: float, layers: int) -> None:
    hits = spread_hits(used, rate, layers)
    assert len(hits) == layers
    assert list(hits) == sorted(hits)
    assert hits[0] >= 0
    assert hits[-1] <= used
    assert fmean(hits) == pytest.approx(used * rate, abs=1e-8)


def test_many_layers_differ_as_chance_has_it() -> None:
    assert pvariance(spread_hits(8, 0.3, 1000)) == pytest.approx(8 * 0.3 * 0.7, rel=0.02)
    assert spread_hits(8, 0.3, 1) == pytest.approx((2.4,))
    assert spread_hits(4, 1.0, 3) == (4, 4, 4)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="0 layers"):
        spread_hits(8, 0.5, 0)
    with pytest.raises(ValueError, match=r"a hit rate of 1\.5"):
        spread_hits(8, 1.5, 2)
