"""Trees of drafts: grown by the chance that a candidate counts, laid out with the likeliest way last."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.speculative.draft import Candidate, Proposal, TreeGuide
from runtime.speculative.growth import grow
from runtime.speculative.tree import DraftTree

CHANCES = (0.6, 0.3)
LOGITS = np.empty(0, np.float32)


def guide(most, *, most_depth=4, place=lambda _reach, _count: True, step=lambda _reach, _count: True):
    """Two candidates behind every way: tokens 1 and 2."""

    def choose(_way, _logits):
        return [Candidate(rank + 1, chance, rank=rank) for rank, chance in enumerate(CHANCES)]

    return TreeGuide(most, most_depth, choose, lambda _source, candidate: candidate.confidence, place, step)


def reaches(proposal):
    found = []
    for place, candidate in enumerate(proposal.candidates):
        parent = proposal.parent(place)
        found.append(candidate.confidence * (found[parent] if parent >= 0 else 1.0))
    return found


@given(st.integers(1, 20), st.integers(1, 5))
def test_the_most_probable_come_first_and_parents_before_children(most, most_depth):
    ways = []
    proposal = grow("test", guide(most, most_depth=most_depth), lambda way: ways.append(tuple(way)) or LOGITS)
    found = reaches(proposal)
    assert found == sorted(found, reverse=True)
    assert all(proposal.parent(place) < place for place in range(len(found)))
    assert len(found) == min(most, sum(2**depth for depth in range(1, most_depth + 1)))
    assert proposal.steps == proposal.computed == len(ways) == len(set(ways))
    assert max(map(len, ways)) < most_depth or most_depth == 1


def test_what_is_not_worth_its_place_or_a_step_is_left_out():
    proposal = grow("test", guide(20, place=lambda reach, _count: reach > 0.2), lambda _way: LOGITS)
    assert min(reaches(proposal)) > 0.2
    alone = grow("test", guide(20, step=lambda _reach, _count: False), lambda _way: LOGITS)
    assert alone.parents == (-1, -1)
    assert alone.steps == 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=14))
def test_a_pass_goes_down_first_and_ends_with_the_first_choices(ups):
    parents = [-1]
    for place, up in enumerate(ups):
        parents.append(max(place - up, -1))
    proposal = Proposal(tuple(Candidate(place, 0.5) for place in range(len(parents))), parents=tuple(parents))
    tree = DraftTree.of(proposal, len(parents))
    assert sorted(tree.numbers) == list(range(len(parents)))
    assert next(tree.numbers[place] for place in tree.last_way) == parents.index(-1)
    for place, parent in enumerate(tree.parents):
        assert parent < place
        assert (-1 if parent < 0 else tree.numbers[parent]) == parents[tree.numbers[place]]
        assert tree.follow(parent, tree.token_ids[place]) == place
    assert tree.follow(-1, 99) is None
    way = [tree.numbers[place] for place in tree.last_way]
    assert way[1:] == [parents.index(number) for number in way[:-1]], "each by its first choice"


def test_a_chain_is_laid_out_as_it_is():
    proposal = Proposal(tuple(Candidate(token, 0.5) for token in (7, 8, 9)))
    tree = DraftTree.of(proposal, 2)
    assert tree.token_ids == (7, 8)
    assert not tree.branches
    assert list(tree.step_parents(2)) == [-1, 0, 1, 2]
