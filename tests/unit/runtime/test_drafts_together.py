"""Drafts of several sequences in one pass: each gets plain decoding's answer, whatever the others' drafts come to."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.sampler import SamplingParams
from runtime.speculative.account import Account
from runtime.speculative.choosers import Chooser
from runtime.speculative.sequence import SpeculativeSequence
from runtime.speculative.together import Together
from runtime.speculative.totals import Totals
from tests.support.drafting import END, HashExecutor, PatternDraft, generation, plain, policy

SAMPLINGS = (SamplingParams(temperature=0), SamplingParams(seed=3), SamplingParams(seed=5, repetition_penalty=1.4))
LONG = SamplingParams(seed=3, logit_bias={END: -math.inf})


def begun(executor, sampling, prompt, **options):
    state = generation(prompt, sampling, **options)
    state.advance(executor.forward([state.next_step(100)])[0][-1])
    return state


def together(executor, states, drafts, by, totals):
    """All answers, those that are over leaving the others."""
    group_of = Together(executor, by)
    running = [
        (state, SpeculativeSequence(executor, draft, Chooser(state.sampler), Account()))
        for state, draft in zip(states, drafts, strict=True)
    ]
    while left := [pair for pair in running if not pair[0].finished]:
        group = group_of.group(len(left))
        found = group_of.step(group, left, totals)
        if isinstance(found, int):
            for state, _ in left:
                state.advance(executor.forward([state.next_step(100)])[0][-1])
            group.policy.idled(1, group.account)
    for state, sequence in running:
        sequence.end(state, by, totals)
    return states


@settings(max_examples=40, deadline=None)
@given(
    patterns=st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=2, max_size=4),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    sampling=st.sampled_from(SAMPLINGS),
    forced=st.booleans(),
    own_device=st.booleans(),
)
def test_any_pattern_over_several_sequences_gives_each_its_plain_answer(patterns, counts, sampling, forced, own_device):
    executor, totals = HashExecutor(), Totals("pattern")
    options = [{"prompt": [1, 5, number], "max_tokens": 12 + 9 * number} for number in range(len(patterns))]
    references = [plain(executor, begun(executor, sampling, **each)) for each in options]
    states = [begun(executor, sampling, **each) for each in options]
    drafts = [
        PatternDraft(reference.session.token_ids, pattern, counts, has_own_device=own_device)
        for reference, pattern in zip(references, patterns, strict=True)
    ]
    together(executor, states, drafts, policy(forced=forced), totals)
    for state, reference in zip(states, references, strict=True):
        assert state.session.token_ids == reference.session.token_ids
        assert [piece.text for piece in state.pieces] == [piece.text for piece in reference.pieces]
        assert state.session.kv.rows == reference.session.kv.rows
    assert totals.failure is None


def test_a_pass_takes_the_drafts_of_all():
    executor, totals = HashExecutor(), Totals("pattern")
    references = [plain(executor, begun(executor, LONG, [1, number], max_tokens=25)) for number in range(3)]
    states = [begun(executor, LONG, [1, number], max_tokens=25) for number in range(3)]
    executor.passes.clear()
    drafts = [PatternDraft(reference.session.token_ids, [True], [5]) for reference in references]
    together(executor, states, drafts, policy(), totals)
    assert len(executor.passes) == 3 * 4, "24 tokens each, six a pass"
    assert totals.tokens_of == {3: 72}
    assert totals.acceptance_rate == 1.0


def test_more_sequences_than_a_pass_has_room_for_drafts_of_are_decoded_without():
    assert Together(HashExecutor(), policy()).group(33) is None
    assert Together(HashExecutor(), policy()).group(32) is not None
