"""How a draft with logits of its own chooses a token: as the target's sampler would, or by a draw of its own.

Knows nothing about models. Invariant: a choice depends on the sampler's parameters and seed, the logits, the position
and the tokens before it alone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.sampler import Sampler
from runtime.speculative.draft import Candidate
from runtime.speculative.rejection import DRAFT_STREAM, drawn, uniform

CHOICES = 3  # proposed for one place of a tree at most: the first, and those that `policy.OTHERS` tells of


class Chooser:
    """Chooses the tokens of one sequence's drafts, with penalties, bias and seed as `sampler`, which stays untouched.

    By default with the random number that the target will use at that position, so that a draft whose distribution is
    the target's is always right. `draws`: for rejection sampling, with a random number of its own.
    """

    def __init__(self, sampler: Sampler, *, draws: bool = False) -> None:
        params = replace(sampler.params, seed=sampler.seed, logprobs=0)
        self._sampler = Sampler(params, sampler.vocab_size)
        self._several = Sampler(replace(params, logprobs=CHOICES), sampler.vocab_size)
        self._draws = draws
        self._sequence: Sequence[int] = ()

    def follow(self, token_ids: Sequence[int], known: int) -> None:
        """The sequence is `token_ids`, whose first `known` tokens are as they were."""
        self._follow(self._sampler, token_ids, known)
        self._sequence = token_ids

    def choose(self, logits: NDArray[np.float32], position: int) -> Candidate:
        """What to draft at `position`; the next choice is behind it. `logits` (vocabulary of the draft,)."""
        sampler = self._sampler
        row = _resized(logits, sampler.vocab_size)
        if self._draws and sampler.params.temperature > 0.0:
            ids, probabilities = sampler.distribution(row, position)
            place = drawn(probabilities, uniform(sampler.seed, position, DRAFT_STREAM))
            chosen = Candidate(int(ids[place]), float(probabilities[place]), ids, probabilities)
        else:
            sampled = sampler.sample(row, position)
            chosen = Candidate(sampled.token_id, float(np.exp(sampled.logprob)))
        sampler.accept(chosen.token_id)
        return chosen

    def choose_several(self, way: Sequence[int], logits: NDArray[np.float32]) -> list[Candidate]:
        """What to draft behind the sequence and the drafts `way`, by rank: what `choose` would, then the most probable.

        Nothing is remembered. `logits` (vocabulary of the draft,).
        """
        sampler, before = self._several, len(self._sequence)
        self._follow(sampler, self._sequence, before)
        for token_id in way:
            sampler.accept(token_id)
        sampled = sampler.sample(_resized(logits, sampler.vocab_size), before + len(way))
        sampler.truncate(before)
        others = [(token_id, logprob) for token_id, logprob in sampled.top_logprobs if token_id != sampled.token_id]
        chosen = [(sampled.token_id, sampled.logprob), *others[: CHOICES - 1]]
        return [
            Candidate(token_id, math.exp(logprob), rank=rank)
            for rank, (token_id, logprob) in enumerate(chosen)
            if logprob > -math.inf
        ]

    @staticmethod
    def _follow(sampler: Sampler, token_ids: Sequence[int], known: int) -> None:
        """Have a sampler know `token_ids`, of which the first `known` are as they were when it was last told."""
        sampler.truncate(min(known, sampler.num_tokens))
        for token_id in token_ids[sampler.num_tokens :]:
            sampler.accept(token_id)


def _resized(logits: NDArray[np.float32], vocab_size: int) -> NDArray[np.float32]:
    """Logits for the target's vocabulary: what only the draft has is cut, what it lacks cannot be drafted."""
    if len(logits) >= vocab_size:
        return logits[:vocab_size]
    padded = np.full(vocab_size, -np.inf, np.float32)
    padded[: len(logits)] = logits
    return padded
