"""Lookup of what followed before."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.speculative.draft import Guide
from runtime.speculative.ngram import LONGEST, SHORTEST, NGramDraft

SEQUENCES = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def guide(most=6):
    return Guide(most, 0, 0, lambda _source, _confidence: True, lambda _row, _position: None)


def proposed(token_ids, most=6):
    draft = NGramDraft()
    draft.begin(token_ids)
    return draft.propose(token_ids, guide(most))


def expected(token_ids, most):
    """By search from the end."""
    for length in range(min(LONGEST, len(token_ids)), SHORTEST - 1, -1):
        tail = token_ids[-length:]
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == tail:
                known = list(token_ids)
                for place in range(end, end + most):
                    known.append(known[place])
                return known[len(token_ids) :]
    return []


@given(SEQUENCES, st.integers(1, 8))
def test_the_newest_of_the_longest_matches_is_followed(token_ids, most):
    assert proposed(token_ids, most).token_ids == expected(token_ids, most)


@given(SEQUENCES, st.lists(st.integers(0, 3), max_size=20))
def test_a_growing_sequence_finds_what_a_new_one_does(token_ids, more):
    draft = NGramDraft()
    draft.begin(token_ids)
    for count in range(len(more) + 1):
        grown = token_ids + more[:count]
        assert draft.propose(grown, guide()).token_ids == proposed(grown).token_ids


def test_longer_matches_are_surer():
    short = proposed([1, 2, 3, 9, 8, 1, 2, 3])
    assert short.token_ids[:2] == [9, 8]
    long = proposed([5, 6, 7, 1, 2, 3, 9, 8, 5, 6, 7, 1, 2, 3])
    assert long.candidates[0].confidence > short.candidates[0].confidence
    assert [c.confidence for c in short.candidates] == sorted(c.confidence for c in short.candidates)


def test_without_a_match_nothing_is_proposed():
    assert proposed([1, 2, 3, 4]).candidates == ()
    assert proposed([1]).candidates == ()
