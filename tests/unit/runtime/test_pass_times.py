"""What passes take: ratios from passes made in turn, whatever the machine's speed does meanwhile."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.speculative.pass_times import PassTimes, RecentMedian


def expected(tokens):
    return 1.0 + 0.1 * (tokens - 1)


def in_turn(times, tokens, ratio, *, speed=lambda _turn: 1.0, turns=3):
    for turn in range(turns):
        times.add(1, speed(2 * turn))
        if turn < turns - 1:
            times.add(tokens, ratio * speed(2 * turn + 1))


def test_before_a_comparison_passes_are_as_expected_at_the_speed_of_the_moment():
    times = PassTimes(expected)
    assert times.seconds(5) == pytest.approx(1.4)
    times.add(1, 2.0)
    assert times.seconds(5) == pytest.approx(2.8)


def test_passes_between_those_that_were_compared_are_corrected_by_both():
    times = PassTimes(expected)
    in_turn(times, 5, 2.1)
    assert times.seconds(5) == pytest.approx(2.1)
    assert times.seconds(3) == pytest.approx(1.2 * 1.25)
    assert times.seconds(9) == pytest.approx(1.8 * 1.5)


def test_more_tokens_never_take_less_time():
    times = PassTimes(expected)
    in_turn(times, 5, 0.8)
    assert [times.seconds(tokens) for tokens in (2, 3, 5)] == [1.0, 1.0, 1.0]
    in_turn(times, 9, 3.0)
    assert 1.0 <= times.seconds(6) <= times.seconds(8) <= 3.0


def test_a_pass_whose_ratio_is_not_known_does_not_tell_the_speed():
    times = PassTimes(expected)
    for seconds in (1.0, 1.1, 1.2):
        times.add(1, seconds)
    for _ in range(9):
        times.add(20, 50.0)
    assert times.plain_s == 1.1


def test_a_pass_that_no_plain_one_is_near_to_changes_no_ratio():
    times = PassTimes(expected)
    in_turn(times, 5, 1.4)
    for _ in range(20):
        times.add(5, 4.2)
    assert times.seconds(5) / times.plain_s == pytest.approx(1.4)
    assert times.plain_s == pytest.approx(3.0), "but the machine is taken for slower"


@settings(max_examples=40, deadline=None)
@given(
    speeds=st.lists(st.floats(0.3, 3.0), min_size=2, max_size=6),
    ratio=st.floats(1.0, 3.0),
    seed=st.integers(0, 99),
)
def test_ratios_hold_at_every_speed_of_the_machine(speeds, ratio, seed):
    """Passes are disturbed by 2%, and one in seven takes twice as long."""
    rng = np.random.default_rng(seed)
    times = PassTimes(expected)
    for speed in speeds:

        def disturbed(turn, speed=speed):
            return speed * rng.uniform(1.0, 1.02) * (2.0 if turn % 7 == 3 else 1.0)

        in_turn(times, 4, ratio, speed=disturbed, turns=8)
    assert times.seconds(4) / times.plain_s == pytest.approx(ratio, rel=0.06)


def test_of_several_lanes_a_plain_pass_has_a_token_of_each():
    times = PassTimes(expected, 3)
    assert times.plain_s == pytest.approx(expected(3))
    for _ in range(3):
        times.add(3, 1.0)
    assert times.seconds(6) == pytest.approx(expected(6) / expected(3))


def test_a_median_takes_the_lesser_of_two_and_what_was_expected_before_there_is_one():
    last = RecentMedian(7.0)
    assert last.value == 7.0
    for value, so_far in ((3.0, 3.0), (2.0, 2.0), (9.0, 3.0), (1000.0, 3.0)):
        last.add(value)
        assert last.value == so_far
