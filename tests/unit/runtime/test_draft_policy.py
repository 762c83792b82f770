"""How many drafts are made, what a bad draft may cost, and when drafting comes back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.speculative.account import Account
from runtime.speculative.draft import Candidate, Proposal
from runtime.speculative.estimates import Acceptance, Calibration, Chance
from runtime.speculative.pass_times import NEAR, PassTimes
from runtime.speculative.policy import Policy, Turn

PLAIN_S = 1e-2
MODEL = ("model", 0)


def simulate(
    policy, tokens, *, draft_s, pass_s, acceptance, seed=0, free=False, overhead_s=2e-5, speed=lambda _done: 1.0
):
    """Seconds of an answer, and how many of its passes had drafts; candidates are right with that chance.

    `speed`: what all times are multiplied by at a token of the answer.
    """
    rng = np.random.default_rng(seed)
    account, seconds, done, passes = Account(), 0.0, 0, 0
    while done < tokens:
        offer = policy.offer(account, tokens - done - 1)
        if offer.idle_tokens:
            idle = min(offer.idle_tokens, tokens - done)
            policy.idled(idle, account)
            for token in range(idle):
                if not token or token >= idle - NEAR:
                    policy.passed_plainly(speed(done) * PLAIN_S)
                seconds += speed(done) * PLAIN_S
                done += 1
            continue
        most = offer.most if free else min(offer.most, offer.most_computed)
        goes_on, drafted = policy.goes_on(offer), 0
        while drafted < most:
            drafted += 1
            if not free and not goes_on("test", 0.8):
                break
        proposal = Proposal((Candidate(1, 0.8),) * drafted, "test", is_computed=not free)
        verified = policy.worth_verifying(offer, proposal)
        accepted = 0
        while accepted < verified and rng.random() < acceptance:
            accepted += 1
        turn = Turn(
            proposal,
            verified,
            accepted,
            0.0 if free else speed(done) * drafted * draft_s,
            speed(done) * pass_s(verified + 1),
            overhead_s,
            offer.is_probe,
        )
        policy.record([turn], account)
        seconds += turn.seconds
        done += accepted + 1
        passes += verified > 0
    return seconds, passes


def policy_of(*, draft_s=1e-3, most=8, expected=lambda tokens: PLAIN_S * (1 + 0.05 * (tokens - 1))):
    return Policy(PassTimes(expected), draft_s=draft_s, acceptance=0.6, most=most)


@settings(max_examples=60, deadline=None)
@given(
    acceptance=st.floats(0.0, 1.0),
    draft_share=st.floats(0.0, 3.0),
    slope=st.floats(0.0, 1.0),
    believed=st.floats(0.0, 0.3),
    tokens=st.integers(64, 600),
    seed=st.integers(0, 9),
    free=st.booleans(),
)
def test_whatever_drafts_are_like_an_answer_takes_three_per_cent_more_at_most(
    acceptance, draft_share, slope, believed, tokens, seed, free
):
    policy = policy_of(draft_s=PLAIN_S * 0.1, expected=lambda n: PLAIN_S * (1 + believed * (n - 1)))
    for answer in range(2):
        seconds, _ = simulate(
            policy,
            tokens,
            draft_s=PLAIN_S * draft_share,
            pass_s=lambda n: PLAIN_S * (1 + slope * (n - 1)),
            acceptance=acceptance,
            seed=seed + answer,
            free=free,
        )
        surprise = PLAIN_S * (8 * max(draft_share - 0.1, 0) + 8 * max(slope - believed, 0)) if not answer else 0.0
        assert seconds - surprise <= tokens * PLAIN_S / 0.97


@pytest.mark.parametrize(("acceptance", "least"), [(0.7, 1.75), (0.9, 3.0)])
def test_good_drafts_are_made_and_pay(acceptance, least):
    seconds, _ = simulate(
        policy_of(), 400, draft_s=5e-4, pass_s=lambda n: PLAIN_S * (1 + 0.03 * (n - 1)), acceptance=acceptance
    )
    assert 400 * PLAIN_S / seconds > least


def test_bad_drafts_are_turned_off_and_tried_again_when_they_are_good():
    policy = policy_of()
    cost = {"draft_s": 2e-3, "pass_s": lambda n: PLAIN_S * (1 + 0.1 * (n - 1))}
    _, passes = simulate(policy, 600, acceptance=0.0, **cost)
    assert 1 <= passes < 20
    seconds, passes = simulate(policy, 1200, acceptance=0.95, **cost)
    assert passes > 100
    assert seconds < 1200 * PLAIN_S * 0.75


def test_forced_drafts_are_all_verified():
    policy = Policy(PassTimes(float), draft_s=1.0, acceptance=0.0, most=5, is_forced=True)
    offer = policy.offer(Account(), 100)
    assert (offer.most, offer.most_computed) == (5, 5)
    assert policy.worth_verifying(offer, Proposal((Candidate(1, 0.01),) * 9, "test")) == 5
    assert policy.offer(Account(), 3).most == 3
    assert policy.offer(Account(), 0).most == 0
    assert policy.plain_tokens_before_start(Account(), 1) == 0


def test_dear_starts_wait_until_the_answer_is_long_enough():
    policy = policy_of(expected=lambda n: 1e-4)
    assert policy.plain_tokens_before_start(Account(), 1) > 10
    assert policy.plain_tokens_before_start(Account(), 300) == 0
    assert policy_of().plain_tokens_before_start(Account(), 1) == 0


def test_estimates_follow_what_happens():
    chance = Chance(0.5)
    for _ in range(200):
        chance.add(right=True)
    assert chance.value > 0.9
    acceptance = Acceptance(0.6, 4)
    assert acceptance.chances(4) == pytest.approx([0.6] * 4)
    for _ in range(100):
        acceptance.add(0, right=True)
        acceptance.add(1, right=False)
    first, second, _, last = acceptance.chances(4)
    assert first > 0.9
    assert second < 0.2
    assert last == pytest.approx(second)
    with pytest.raises(ValueError, match="acceptance"):
        Acceptance(1.5, 2)


def test_confidence_is_calibrated_by_source():
    calibration = Calibration()
    for _ in range(100):
        calibration.add(MODEL, 0.9, right=False)
    assert calibration.chance(MODEL, 0.9) < 0.15
    assert calibration.chance(("n-gram", 0), 0.9) > 0.6
    assert calibration.chance(MODEL, 0.1) < calibration.chance(("n-gram", 0), 0.99)


def test_a_second_choice_is_calibrated_apart_from_the_first():
    calibration = Calibration()
    for _ in range(100):
        calibration.add(("model", 1), 0.2, right=True)
    assert calibration.chance(("model", 1), 0.2) > 0.8
    assert calibration.chance(MODEL, 0.2) < 0.3


def tree_turn(way, *, verified=5):
    """Two choices behind the sequence, two behind the first of them, one behind the second."""
    ranks = (0, 1, 0, 1, 0)
    candidates = tuple(Candidate(token, 0.5, rank=rank) for token, rank in enumerate(ranks))
    proposal = Proposal(candidates, "model", True, parents=(-1, -1, 0, 0, 1), steps=3)
    return Turn(proposal, verified, len(way), 3e-3, 1.2e-2, way=way)


def test_what_a_tree_teaches_is_of_the_candidates_that_were_put_to_the_test():
    policy = Policy(PassTimes(lambda _tokens: PLAIN_S), draft_s=1.0, acceptance=0.5, most=4, most_tree=8)
    ranks = policy.ranks.chances()
    policy.record([tree_turn((1, 4))], Account())
    first, second, third, _ = policy.acceptance.chances(4)
    assert first < 0.5 < second
    assert third == pytest.approx(second)
    assert policy.ranks.chances()[0] > ranks[0]
    assert policy.ranks.chances()[1] == ranks[1]
    assert policy.costs().draft_s == pytest.approx(1e-3)
    before = policy.ranks.chances()[0]
    policy.record([tree_turn((0, 2))], Account())
    assert policy.ranks.chances()[0] == before, "behind a first choice that is right the second is not put to the test"


def test_a_tree_is_wanted_where_passes_of_any_size_cost_alike_and_not_where_a_token_more_costs_a_pass():
    for slope, wants in ((0.0, True), (0.9, False)):
        policy = Policy(
            PassTimes(lambda n, slope=slope: PLAIN_S * (1 + slope * (n - 1))),
            draft_s=PLAIN_S * 0.05, acceptance=0.6, most=8, most_tree=24,
        )  # fmt: skip
        account = Account(gain_s=1.0, turns=1)
        for _ in range(2):
            policy.record([Turn(Proposal(), 0, 0, 0.0, PLAIN_S)], account)
        offer = policy.offer(account, 8, 60)
        assert (offer.tree > 8) == wants
        assert policy.offer(account, 8, 0).tree == 0
        guide = policy.tree_guide(offer, lambda _way, _logits: ())
        assert (guide is not None) == wants
        if guide is not None:
            assert guide.worth_a_place(1e-3, 3), "a place costs nothing"
            assert guide.worth_a_step(0.5, 3)
            assert not guide.worth_a_step(0.01, 3)


def test_what_several_sequences_take_is_learned_apart_and_what_drafts_are_like_together():
    policy = policy_of()
    both = policy.for_lanes(2)
    turn = Turn(Proposal((Candidate(1, 0.8),) * 2, "test", is_computed=True), 2, 2, 2e-3, 9e-3)
    both.passed_plainly(1.2e-2)
    both.record([turn, turn], Account())
    both.passed_plainly(1.2e-2)
    assert both.plain_s == 1.2e-2
    assert policy.plain_s == PLAIN_S
    assert policy.acceptance.chances(1)[0] > 0.6
    assert both.costs().draft_s == pytest.approx(2 * policy.costs().draft_s)
    assert both.costs().verify_s(3) == pytest.approx(1.8e-2)


@settings(max_examples=30, deadline=None)
@given(
    speeds=st.lists(st.sampled_from((0.6, 0.8, 1.0, 1.4)), min_size=2, max_size=6),
    each=st.integers(100, 400),
    acceptance=st.sampled_from((0.1, 0.5, 0.9)),
    seed=st.integers(0, 9),
)
def test_a_machine_that_changes_its_speed_neither_turns_drafts_off_nor_on(speeds, each, acceptance, seed):
    def speed(done):
        return speeds[done // each % len(speeds)]

    policy, tokens = policy_of(draft_s=PLAIN_S * 0.1), 1200
    seconds, _ = simulate(
        policy, tokens,
        draft_s=PLAIN_S * 0.1, pass_s=lambda n: PLAIN_S * (1 + 0.05 * (n - 1)), acceptance=acceptance, seed=seed,
        speed=speed,
    )  # fmt: skip
    plainly_s = sum(PLAIN_S * speed(done) for done in range(tokens))
    gain = plainly_s / seconds
    assert gain > {0.1: 0.96, 0.5: 1.15, 0.9: 2.4}[acceptance]
