"""The cost model of drafts against its closed form and against trying every depth."""

from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.draft_depth import Costs, best_depth, best_tree, expected_tokens, worth_verifying

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
    reaches = list(accumulate(chances, mul))
    assert surplus(worth_verifying(reaches, given_costs, rate)) == pytest.approx(best)


@given(CHANCES, st.floats(0.0, 2.0), st.floats(0.0, 0.5))
def test_a_tree_without_other_choices_is_the_best_chain(chances, draft_s, slope):
    given_costs = costs(draft_s=draft_s, slope=slope)
    tree, chain = best_tree(chances, (), given_costs, 12), best_depth(chances, given_costs)
    assert tree.tokens_per_s == pytest.approx(chain.tokens_per_s)


@given(CHANCES, st.lists(st.floats(0.0, 1.0), max_size=2), st.floats(0.0, 0.5), st.integers(1, 20))
def test_a_tree_is_never_worse_than_a_chain_of_as_many_drafts(chances, others, slope, most):
    given_costs = costs(draft_s=0.0, slope=slope)
    tree = best_tree(chances, others, given_costs, most)
    assert tree.tokens_per_s >= best_depth(chances[:most], given_costs).tokens_per_s * (1 - 1e-9)
    assert tree.drafts <= most


def test_a_tree_of_the_best_three_is_told_by_hand():
    given_costs = costs(draft_s=0.1, exchange_s=0.0, slope=0.0)
    tree = best_tree([0.5, 0.5], [0.8], given_costs, 3)
    # 0.5 first, 0.4 second choice behind the root, then 0.25 behind the first: two steps of the draft
    assert tree.drafts == 3
    assert tree.tokens_per_s == pytest.approx((1 + 0.5 + 0.4 + 0.25) / 1.2)
    assert best_tree([0.5, 0.5], [0.8], given_costs, 2).tokens_per_s == pytest.approx((1 + 0.5 + 0.4) / 1.1)
