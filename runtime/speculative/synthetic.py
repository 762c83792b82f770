"""Drafts that are right with a given chance, for benchmarks and tests: the answer must be known beforehand.

Time is spent as by a real source where there is one behind it, or as a device with a given time a token would take.
In a tree the second choice is right with `OTHERS[0]` of the chance that the first leaves, and so on. Knows nothing
of how the answer was found. Invariant: whether a position's draft is right depends on seed and position alone.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.sampler import Sampler
from runtime.speculative.draft import (
    Candidate,
    DraftSource,
    Guide,
    Proposal,
    SequenceDraft,
    TreeGuide,
    grows_trees,
    on_features,
)
from runtime.speculative.growth import grow
from runtime.speculative.rejection import uniform

NAME = "synthetic"
OTHERS = (0.45, 0.3)
NO_LOGITS = np.empty(0, np.float32)
STREAM = 4  # of random numbers


class SyntheticSource:
    """`DraftSource` whose tokens are right with chance `acceptance`; `behind`: the source whose time they take.

    `step_s`: without one, seconds that the drafting device, which is none of the target's, takes for a token.
    """

    def __init__(
        self, acceptance: float, behind: DraftSource | None = None, *, step_s: float = 0.0, seed: int = 0
    ) -> None:
        """ValueError for an acceptance that is no chance."""
        if not 0.0 <= acceptance <= 1.0:
            raise ValueError(f"an acceptance of {acceptance}")
        self.name = f"{NAME} {acceptance:g}" + (f" at the cost of {behind.name}" if behind is not None else "")
        self.acceptance = acceptance
        self._behind = behind
        self._step_s = step_s
        self._seed = seed

    def sequence(self, sampler: Sampler, capacity_tokens: int) -> "SyntheticDraft":
        """See `DraftSource`."""
        behind = None if self._behind is None else self._behind.sequence(sampler, capacity_tokens)
        return SyntheticDraft(self.acceptance, behind, sampler.vocab_size, self._step_s, self._seed)

    def close(self) -> None:
        """See `DraftSource`."""
        if self._behind is not None:
            self._behind.close()


class SyntheticDraft:
    """`SequenceDraft` of a known answer; it proposes nothing before it is told, and nothing behind the answer's end."""

    def __init__(
        self, acceptance: float, behind: SequenceDraft | None, vocab_size: int, step_s: float, seed: int
    ) -> None:
        self._acceptance = acceptance
        self._behind = behind
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._seed = seed
        self._answer: Sequence[int] = ()

    @property
    def has_own_device(self) -> bool:
        """See `SequenceDraft`."""
        return self._step_s > 0.0 if self._behind is None else self._behind.has_own_device

    @property
    def wants_features(self) -> bool:
        """See `FeatureDraft`."""
        return on_features(self._behind) is not None

    def observe(self, feature: NDArray[np.float32]) -> None:
        """See `FeatureDraft`."""
        if (follower := on_features(self._behind)) is not None:
            follower.observe(feature)

    @property
    def grows_trees(self) -> bool:
        """See `TreeDraft`."""
        return grows_trees(self._behind) if self._behind is not None else not self._step_s

    def foresee(self, token_ids: Sequence[int]) -> None:
        """The sequence will be this, prompt included."""
        self._answer = token_ids

    def begin(self, token_ids: Sequence[int]) -> None:
        """See `SequenceDraft`."""
        if self._behind is not None:
            self._behind.begin(token_ids)

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        """See `SequenceDraft`."""
        start = len(token_ids)
        known = [self._token(position) for position in range(start, min(start + guide.most, len(self._answer)))]
        if self._behind is not None:
            judged = replace(
                guide, most=len(known), goes_on=lambda _source, _confidence: guide.goes_on(NAME, self._acceptance)
            )
            if guide.tree is not None and known:
                tree = self._tree(guide.tree, list(token_ids), len(known))
                return replace(self._behind.propose(token_ids, replace(judged, tree=tree)), source=NAME)
            proposal = self._behind.propose(token_ids, judged)
            drafted = self._candidates(known[: len(proposal.candidates)])
            return replace(proposal, candidates=drafted, source=NAME)
        if guide.tree is not None and known:
            return grow(NAME, self._tree(guide.tree, list(token_ids), len(known)), lambda _way: NO_LOGITS)
        if not self._step_s:
            return Proposal(self._candidates(known), NAME)
        return self._after_steps(known[: guide.most_computed], guide)

    def _tree(self, guide: TreeGuide, token_ids: list[int], most_depth: int) -> TreeGuide:
        """`guide`, but for what is chosen: tokens of the answer, or others, in place of those behind's choices."""

        def choose(way: Sequence[int], _logits: NDArray[np.float32]) -> list[Candidate]:
            position = len(token_ids) + len(way)
            is_right = list(self._answer[:position]) == [*token_ids, *way]
            return self._choices(position, self._answer[position] if is_right else None)

        def chance(_source: str, candidate: Candidate) -> float:
            return guide.chance(NAME, candidate)

        return replace(guide, most_depth=min(guide.most_depth, most_depth), choose=choose, chance=chance)

    def _choices(self, position: int, answer: int | None) -> list[Candidate]:
        """Candidates by rank, one of which may be the answer's token: None where the way to it is wrong already."""
        number, least, left = uniform(self._seed, position, STREAM), 0.0, 1.0
        chosen = []
        for rank, share in enumerate((self._acceptance, *OTHERS)):
            chance = left * share
            is_right = answer is not None and least <= number < least + chance
            token_id = ((answer or 0) + (0 if is_right else rank + 1)) % self._vocab_size
            chosen.append(Candidate(token_id, chance, rank=rank))
            least, left = least + chance, left - chance
        return chosen

    def _after_steps(self, known: Sequence[int], guide: Guide) -> Proposal:
        """The candidates, each after the time of a step."""
        count = 0
        while count < len(known):
            time.sleep(self._step_s)
            count += 1
            if not guide.goes_on(NAME, self._acceptance):
                break
        return Proposal(self._candidates(known[:count]), NAME, is_computed=True)

    def _candidates(self, token_ids: Sequence[int]) -> tuple[Candidate, ...]:
        return tuple(Candidate(token_id, self._acceptance) for token_id in token_ids)

    def _token(self, position: int) -> int:
        """The answer's token at a position, or another one."""
        token_id = self._answer[position]
        if uniform(self._seed, position, STREAM) < self._acceptance:
            return token_id
        return (token_id + 1) % self._vocab_size
