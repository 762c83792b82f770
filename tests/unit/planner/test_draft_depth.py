"""The cost model of drafts against its closed form and against trying every depth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.draft_depth import Costs, best_depth, expected_tokens, worth_verifying

CHANCES = st.lists(st.floats(0.0, 1.0), max_size=12)


def costs(draft_s=0.1, exchange_s=0.02, slope=0.05, plain_s=1.0):
    return Costs(draft_s, exchange_s, lambda tokens: plain_s * (1 + slope * (tokens - 1)), plain_s)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("length", [0, 1, 4, 16])
def test_one_chance_for_all_gives_the_closed_form(acceptance, length):
    closed = (1 - acceptance ** (length + 1)) / (1 - acceptance)
    assert expected_tokens([acceptance] * length) == pytest.approx(closed)


@given(CHANCES, st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_the_best_depth_is_the_best_of_all(chances, draft_s, slope):
    given_costs = costs(draft_s=draft_s, slope=slope)
    rates = [given_costs.plain_rate] + [
        expected_tokens(chances[:drafts]) / given_costs.turn_s(drafts) for drafts in range(1, len(chances) + 1)
    ]
    depth = best_depth(chances, given_costs)
    assert depth.tokens_per_s == pytest.approx(max(rates))
    assert rates[depth.drafts] == pytest.approx(max(rates))


def test_drafts_that_cost_as_much_as_they_save_are_not_made():
    assert best_depth([0.6] * 8, costs(draft_s=0.9)).drafts == 0
    assert best_depth([0.02] * 8, costs()).drafts == 0
    assert best_depth([0.9] * 8, costs(draft_s=0.02)).drafts == 8


@given(CHANCES, st.floats(0.5, 3.0))
def test_what_is_verified_brings_most_for_its_time(chances, rate):
    given_costs = costs()

    def surplus(drafts):
        seconds = given_costs.turn_s(drafts) - drafts * given_costs.draft_s if drafts else given_costs.plain_s
        return expected_tokens(chances[:drafts]) - rate * seconds

    best = max(surplus(drafts) for drafts in range(len(chances) + 1))
    assert surplus(worth_verifying(chances, given_costs, rate)) == pytest.approx(best)
