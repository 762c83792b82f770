"""A draft model's cache follows its sequence through rejections, windows and turns."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.executor.base import Step
from runtime.sampler import Sampler, SamplingParams
from runtime.speculative.choosers import Chooser
from runtime.speculative.draft import Guide, Proposal
from runtime.speculative.mixed import MixedDraft
from runtime.speculative.model_draft import ModelDraft
from runtime.speculative.ngram import NGramDraft
from runtime.speculative.synthetic import SyntheticSource
from tests.support.drafting import HashExecutor, ListKV

GREEDY = SamplingParams(temperature=0)
VOCAB = 23


def guide_for(token_ids, *, most=4, computed=4, reading=1000, goes_on=True):
    chooser = Chooser(Sampler(GREEDY, VOCAB))
    chooser.follow(token_ids, 0)
    return Guide(most, computed, reading, lambda _source, _confidence: goes_on, chooser.choose)


def greedy(executor, token_ids, count):
    """What the model itself would say."""
    kv, said, step = ListKV(500), [], list(token_ids)
    while len(said) < count:
        said.append(int(executor.forward([Step(step, kv)])[0][-1].argmax()))
        step = said[-1:]
    return said


def draft_of(executor, capacity=200):
    return ModelDraft(executor, executor.new_kv(capacity), "small", VOCAB)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, VOCAB - 1)), min_size=1, max_size=12))
def test_what_it_proposes_is_what_the_model_says_whatever_was_rejected(turns):
    executor = HashExecutor(VOCAB)
    draft, token_ids = draft_of(executor), [1, 2, 3, 4, 5]
    draft.begin(token_ids)
    for accepted, corrected in turns:
        proposal = draft.propose(token_ids, guide_for(token_ids))
        assert proposal.is_computed
        assert proposal.token_ids == greedy(executor, token_ids, 4)
        token_ids = [*token_ids, *proposal.token_ids[:accepted], corrected]


def test_it_stops_where_another_token_is_not_worth_it():
    draft = draft_of(HashExecutor(VOCAB))
    assert len(draft.propose([1, 2, 3], guide_for([1, 2, 3], goes_on=False)).candidates) == 1
    assert draft.propose([1, 2, 3, 4], guide_for([1, 2, 3, 4], computed=0)) == Proposal(source="small")


def test_a_short_cache_holds_the_newest_part():
    executor = HashExecutor(VOCAB)
    draft, token_ids = draft_of(executor, capacity=24), [1, 2, 3]
    draft.begin(token_ids)
    for turn in range(60):
        proposal = draft.propose(token_ids, guide_for(token_ids))
        assert len(proposal.candidates) == 4
        token_ids = [*token_ids, *proposal.token_ids[: turn % 4], turn % VOCAB]
    assert len(token_ids) > 60
    assert sum(executor.passes) < 8 * len(token_ids)


def test_it_reads_no_more_than_it_may_and_more_when_it_can():
    executor = HashExecutor(VOCAB)
    draft, token_ids = draft_of(executor, capacity=400), list(range(20)) * 10
    draft.begin(token_ids)
    assert draft.propose(token_ids, guide_for(token_ids, reading=20)).read_tokens == 18
    token_ids = [*token_ids, 1]
    assert draft.propose(token_ids, guide_for(token_ids, reading=0)).read_tokens == 0
    proposal = draft.propose([*token_ids, 2], guide_for([*token_ids, 2], reading=1000))
    assert proposal.read_tokens == 200
    assert proposal.token_ids == greedy(executor, [*token_ids, 2], 4)
    assert proposal.read_s > 0


def test_a_turn_that_begins_alike_keeps_what_was_read():
    executor = HashExecutor(VOCAB)
    draft, token_ids = draft_of(executor), [1, 2, 3, 4, 5, 6, 7, 8]
    draft.begin(token_ids)
    draft.propose(token_ids, guide_for(token_ids))
    executor.passes.clear()
    following = [*token_ids, 9, 10, 11]
    draft.begin(following)
    assert draft.propose(following, guide_for(following)).token_ids == greedy(executor, following, 4)
    assert sum(executor.passes[:5]) < len(following)
    draft.begin([3, 3])
    assert draft.propose([3, 3], guide_for([3, 3])).token_ids == greedy(executor, [3, 3], 4)


def test_tokens_that_the_draft_does_not_know_do_not_stop_it():
    draft = ModelDraft(HashExecutor(VOCAB - 3), ListKV(50), "small", VOCAB - 3)
    assert len(draft.propose([1, VOCAB - 1, 2], guide_for([1, VOCAB - 1, 2])).candidates) == 4


def test_lookup_goes_before_the_model_where_it_is_sure():
    mixed = MixedDraft(NGramDraft(), draft_of(HashExecutor(VOCAB)))
    repeating = [1, 2, 3, 4, 5, 1, 2, 3]
    mixed.begin(repeating)
    assert mixed.propose(repeating, guide_for(repeating)).token_ids[:2] == [4, 5]
    other = [*repeating, 9]
    assert mixed.propose(other, guide_for(other)).source == "small"
    assert not mixed.has_own_device


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_synthetic_drafts_are_right_as_often_as_asked(acceptance):
    source = SyntheticSource(acceptance)
    draft = source.sequence(Sampler(GREEDY, VOCAB), 100)
    answer = [index % VOCAB for index in range(2000)]
    assert draft.propose([0], guide_for([0])).candidates == ()
    draft.foresee(answer)
    right = sum(
        draft.propose(answer[:position], guide_for([0], most=1)).token_ids == [answer[position]]
        for position in range(1, 1999)
    )
    assert right / 1998 == pytest.approx(acceptance, abs=0.04)
    assert draft.propose(answer[:-2], guide_for([0])).token_ids[2:] == []


def test_synthetic_drafts_take_the_time_of_the_source_behind_them():
    executor = HashExecutor(VOCAB)

    class Source:
        name = "small"

        def sequence(self, sampler, capacity_tokens):
            return draft_of(executor)

    draft = SyntheticSource(0.9, Source()).sequence(Sampler(GREEDY, VOCAB), 100)
    draft.foresee(list(range(20)))
    draft.begin([0, 1, 2])
    proposal = draft.propose([0, 1, 2], guide_for([0, 1, 2]))
    assert len(executor.passes) >= len(proposal.candidates) == 4
    assert proposal.source == "synthetic"
    assert SyntheticSource(0.9, step_s=1e-4).sequence(Sampler(GREEDY, VOCAB), 9).has_own_device
