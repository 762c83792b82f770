"""Hit rates as functions of slots: from a trace, and assumed."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.policies import PolicyName
from offload.synthetic_trace import synthetic_trace
from offload.trace_replay import hit_curve, replay
from planner.hit_curve import assumed_curve, traced_curve
from planner.items import POPULARITY_EXPONENT, expert_classes


def test_a_traced_curve_goes_through_its_points_and_straight_between():
    curve = traced_curve([(30, 0.6), (10, 0.2)], 40)
    assert [curve.hit_rate(slots) for slots in (0, 5, 10, 20, 30, 35, 40)] == pytest.approx(
        [0, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
    )
    assert curve.hit_rate(-1) == 0
    assert curve.hit_rate(100) == 1
    assert curve.is_traced


def test_a_traced_curve_never_falls_and_keeps_its_ends():
    curve = traced_curve([(0, 0.5), (10, 0.4), (20, 0.3), (40, 0.9)], 40)
    assert curve.slots == (0, 10, 20, 40)
    assert curve.hit_rates == (0.0, 0.4, 0.4, 1.0)


def test_without_points_hits_go_with_the_slots():
    assert traced_curve([], 64).hit_rate(16) == 0.25


def test_even_popularity_hits_in_proportion():
    curve = assumed_curve(4, 16, 2, popularity_exponent=0.0)
    for slots in (0, 1, 13, 32, 64):
        assert curve.hit_rate(slots) == pytest.approx(slots / 64)
    assert not curve.is_traced


def test_the_default_agrees_with_the_planners_classes():
    """The classes of popularity that placements are made of say the same about each class held."""
    curve = assumed_curve(3, 64, 8, popularity_exponent=POPULARITY_EXPONENT)
    held, hits = 0, 0.0
    for experts, probability in expert_classes(64, 8):
        held, hits = held + experts, hits + experts * probability
        assert curve.hit_rate(3 * held) == pytest.approx(hits / 8)


@settings(max_examples=50, deadline=None)
@given(layers=st.integers(1, 5), experts=st.integers(1, 200), part=st.floats(0, 1), exponent=st.floats(0, 3))
def test_assumed_curves_rise_ever_slower_to_one(layers, experts, part, exponent):
    used = max(1, math.ceil(part * experts))
    curve = assumed_curve(layers, experts, used, popularity_exponent=exponent)
    rates = curve.hit_rates
    steps = [after - before for before, after in pairwise(rates)]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(1)
    assert all(0 <= step <= 1 / used + 1e-9 for step in steps)
    assert all(after <= before + 1e-9 for before, after in pairwise(steps))


@pytest.mark.parametrize("numbers", [(0, 8, 2), (2, 8, 0), (2, 8, 9)])
def test_models_without_experts_have_no_curve(numbers):
    with pytest.raises(ValueError, match="experts used"):
        assumed_curve(*numbers, popularity_exponent=0.5)


def test_the_curve_of_a_trace_predicts_sizes_that_were_not_replayed():
    trace = synthetic_trace(4, 32, 4, 400, zipf_exponent=0.7, reuse=0.2, seed=1)
    curve = traced_curve(hit_curve(trace, PolicyName.LFU, range(16, 128, 16), warm_up_tokens=100), 128)
    for slots in (24, 56, 88):
        assert curve.hit_rate(slots) == pytest.approx(
            replay(trace, slots, PolicyName.LFU, warm_up_tokens=100).hit_rate, abs=0.03
        )
