"""Decoding with drafts gives plain decoding's answer and cache, whatever is accepted, rejected or breaks."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.sampler import SamplingParams
from runtime.session import Session
from runtime.speculative.ngram import NGramDraft
from runtime.speculative.totals import Totals
from tests.support.drafting import (
    END,
    HashExecutor,
    ListKV,
    PatternDraft,
    TreePatternDraft,
    drafted,
    generation,
    plain,
    policy,
)

GREEDY = SamplingParams(temperature=0)
SAMPLINGS = (
    GREEDY,
    SamplingParams(seed=3),
    SamplingParams(seed=4, temperature=1.5, top_k=0, top_p=0.9, min_p=0.0),
    SamplingParams(seed=5, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, penalty_last_n=9),
    SamplingParams(seed=6, logit_bias={1: 2.0, 2: -50.0}, logprobs=3),
)
LONG = SamplingParams(seed=3, logit_bias={END: -math.inf})
PROMPT = [1, 5, 9, 5]


def pieces_of(state):
    return [
        (piece.token_id, piece.text, piece.logprob, piece.top_logprobs, piece.finish_reason) for piece in state.pieces
    ]


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.lists(st.booleans(), min_size=1, max_size=12),
    counts=st.lists(st.integers(0, 16), min_size=1, max_size=6),
    sampling=st.sampled_from(SAMPLINGS),
    max_tokens=st.integers(1, 40),
    own_device=st.booleans(),
)
def test_any_pattern_of_acceptance_gives_plain_pieces_and_the_plain_cache(
    pattern, counts, sampling, max_tokens, own_device
):
    executor = HashExecutor()
    reference = plain(executor, generation(PROMPT, sampling, max_tokens=max_tokens))
    draft = PatternDraft(reference.session.token_ids, pattern, counts, has_own_device=own_device)
    state = drafted(executor, generation(PROMPT, sampling, max_tokens=max_tokens), draft, by=policy(most=16))
    assert pieces_of(state) == pieces_of(reference)
    assert state.session.kv.rows == reference.session.kv.rows
    assert state.session.token_ids == reference.session.token_ids


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    most_tree=st.integers(2, 40),
    most=st.integers(1, 9),
    sampling=st.sampled_from(SAMPLINGS),
    max_tokens=st.integers(1, 40),
)
def test_any_way_through_trees_gives_plain_pieces_and_rows_that_plain_decoding_leaves(
    ranks, most_tree, most, sampling, max_tokens
):
    executor = HashExecutor()
    reference = plain(executor, generation(PROMPT, sampling, max_tokens=max_tokens))
    draft = TreePatternDraft(reference.session.token_ids, ranks, most_tree)
    by = policy(most=most, most_tree=most_tree)
    state = drafted(executor, generation(PROMPT, sampling, max_tokens=max_tokens), draft, by=by)
    assert pieces_of(state) == pieces_of(reference)
    kept = state.session.kv.length
    assert state.session.kv.rows == reference.session.kv.rows[:kept]
    assert len(reference.session.kv.rows) - kept <= most
    assert state.session.token_ids == reference.session.token_ids


def test_a_right_choice_of_any_rank_counts_and_is_told():
    executor = HashExecutor()
    reference = plain(executor, generation(PROMPT, LONG, max_tokens=40))
    executor.passes.clear()
    totals = Totals("pattern")
    draft = TreePatternDraft(reference.session.token_ids, [0, 1, 2], 30)
    drafted(executor, generation(PROMPT, LONG, max_tokens=40), draft, by=policy(most_tree=30), totals=totals)
    assert len(executor.passes) < 20
    assert totals.trees == draft.trees
    assert min(totals.tree_right[rank] for rank in range(3)) >= 3
    assert any("no first choice" in line for line in totals.lines())
    assert totals.as_dict()["tree_right_by_rank"] == [totals.tree_right[rank] for rank in range(3)]


def answer_with(token_id, sampling=GREEDY):
    """A prompt whose answer has that token somewhere in the middle."""
    executor = HashExecutor()
    for first in range(20):
        reference = plain(executor, generation([first, 2], sampling, max_tokens=40))
        found = [piece.token_id for piece in reference.pieces]
        if token_id in found[3:20] and len(found) > found.index(token_id) >= 3:
            return [first, 2], reference
    raise AssertionError("no such answer")


def test_an_end_of_generation_inside_an_accepted_run_ends_there():
    prompt, reference = answer_with(END)
    assert reference.finish_reason == "stop"
    draft = PatternDraft([*reference.session.token_ids, 1, 2, 3], [True], [16])
    state = drafted(HashExecutor(), generation(prompt, GREEDY, max_tokens=40), draft, by=policy(most=16))
    assert pieces_of(state) == pieces_of(reference)
    assert state.session.kv.rows == reference.session.kv.rows


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_inside_an_accepted_run_ends_there(length):
    executor = HashExecutor()
    whole = plain(executor, generation(PROMPT, LONG, max_tokens=30)).completion().text
    stop = whole[6 : 6 + length]
    reference = plain(executor, generation(PROMPT, LONG, max_tokens=30, stop=[stop]))
    draft = PatternDraft([*reference.session.token_ids, 1, 2, 3], [True], [12])
    state = drafted(executor, generation(PROMPT, LONG, max_tokens=30, stop=[stop]), draft, by=policy(most=16))
    assert state.finish_reason == "stop"
    assert pieces_of(state) == pieces_of(reference)
    assert stop not in state.completion().text
    assert state.session.kv.rows == reference.session.kv.rows


def test_the_end_of_the_context_is_where_plain_decoding_ends():
    executor = HashExecutor()
    reference = plain(executor, generation(PROMPT, LONG, capacity=14))
    draft = PatternDraft([*reference.session.token_ids, *range(20)], [True], [16])
    state = drafted(executor, generation(PROMPT, LONG, capacity=14), draft, by=policy(most=16))
    assert pieces_of(state) == pieces_of(reference)
    assert max(executor.passes) <= 14


@pytest.mark.parametrize("after", [1, 2, 5, 9])
def test_cancelled_in_the_middle_of_an_accepted_run_the_next_token_is_the_last(after):
    executor = HashExecutor()
    reference = plain(executor, generation(PROMPT, LONG, max_tokens=30))
    draft = PatternDraft(reference.session.token_ids, [True], [8])
    state = drafted(executor, generation(PROMPT, LONG, max_tokens=30), draft, stop_after=after)
    assert state.finish_reason == "cancelled"
    assert [piece.token_id for piece in state.pieces] == [piece.token_id for piece in reference.pieces[: after + 1]]
    assert state.session.kv.length == len(state.session.token_ids) - 1


@pytest.mark.parametrize("own_device", [False, True])
@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_draft_that_fails_in_the_middle_is_left_out_and_told(own_device, fails_at, caplog):
    executor = HashExecutor()
    reference = plain(executor, generation(PROMPT, LONG, max_tokens=25))
    draft = PatternDraft(reference.session.token_ids, [True, False, True], [4], has_own_device=own_device)
    draft.fails_at = fails_at
    totals = Totals("pattern")
    state = drafted(executor, generation(PROMPT, LONG, max_tokens=25), draft, totals=totals)
    assert pieces_of(state) == pieces_of(reference)
    assert "device is gone" in totals.failure
    assert "failed" in totals.summary()
    assert "answers go on without" in caplog.text


def test_a_target_that_fails_leaves_the_sequence_as_it_was():
    executor = HashExecutor()
    reference = plain(executor, generation(PROMPT, LONG, max_tokens=20))
    executor.passes.clear()
    executor.fails_at = 3
    state = generation(PROMPT, LONG, max_tokens=20)
    with pytest.raises(RuntimeError, match="device is gone"):
        drafted(executor, state, PatternDraft(reference.session.token_ids, [True], [2]))
    assert state.session.kv.rows == state.session.token_ids[: state.session.kv.length]
    assert state.session.kv.length >= len(state.session.token_ids) - 1


def test_a_session_goes_on_after_an_answer_with_drafts():
    executor = HashExecutor()
    session, other = Session(ListKV(200)), Session(ListKV(200))
    prompt = list(PROMPT)
    for turn in range(3):
        sampling = SamplingParams(seed=turn, logit_bias={END: -math.inf})
        reference = plain(executor, generation(prompt, sampling, max_tokens=12, session=other))
        draft = PatternDraft(reference.session.token_ids, [True, True, False], [5])
        state = drafted(executor, generation(prompt, sampling, max_tokens=12, session=session), draft)
        assert pieces_of(state) == pieces_of(reference)
        assert session.kv.rows == other.kv.rows
        prompt = [*session.token_ids, 3, 4]


def test_accepted_drafts_save_passes_and_are_counted():
    executor = HashExecutor()
    reference = plain(executor, generation(PROMPT, LONG, max_tokens=25))
    executor.passes.clear()
    totals = Totals("pattern")
    tokens = len(reference.pieces)
    draft = PatternDraft(reference.session.token_ids, [True], [4])
    drafted(executor, generation(PROMPT, LONG, max_tokens=25), draft, totals=totals)
    assert len(executor.passes) == 1 + -(-(tokens - 1) // 5)
    assert totals.tokens == tokens - 1
    assert totals.acceptance_rate == 1.0
    assert totals.by_position() == [1.0] * 4
    assert totals.as_dict()["tokens_per_pass"] == pytest.approx((tokens - 1) / totals.passes)
    assert any("accepted by position: 100%" in line for line in totals.lines())


def test_a_draft_with_its_own_device_works_while_the_target_does():
    class Slow(HashExecutor):
        def forward(self, steps, *, logits="last"):
            time.sleep(0.005)
            return super().forward(steps, logits=logits)

    class SlowDraft(PatternDraft):
        def propose(self, token_ids, guide):
            time.sleep(0.004)
            return super().propose(token_ids, guide)

    reference = plain(HashExecutor(), generation(PROMPT, LONG, max_tokens=33))
    waited = {}
    for own_device in (False, True):
        totals = Totals("slow")
        draft = SlowDraft([*reference.session.token_ids, *range(20)], [True], [3], has_own_device=own_device)
        state = drafted(Slow(), generation(PROMPT, LONG, max_tokens=33), draft, totals=totals)
        assert pieces_of(state) == pieces_of(reference)
        waited[own_device] = totals.draft_s / totals.passes
    assert waited[True] < 0.5 * waited[False]


@settings(max_examples=30, deadline=None)
@given(prompt=st.lists(st.integers(0, 3), min_size=2, max_size=40), seed=st.integers(0, 5))
def test_lookup_drafts_leave_the_answer_as_it_is(prompt, seed):
    executor = HashExecutor()
    sampling = SamplingParams(seed=seed, top_k=3)
    reference = plain(executor, generation(prompt, sampling, max_tokens=20))
    state = drafted(executor, generation(prompt, sampling, max_tokens=20), NGramDraft())
    assert pieces_of(state) == pieces_of(reference)
    assert state.session.kv.rows == reference.session.kv.rows
