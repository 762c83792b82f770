"""How a draft with logits of its own chooses a token: as the target's sampler would, or by a draw of its own.

Knows nothing about models. Invariant: a choice depends on the sampler's parameters and seed, the logits, the position
and the tokens before it alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.sampler import Sampler
from runtime.speculative.draft import Candidate
from runtime.speculative.rejection import DRAFT_STREAM, drawn, uniform


class Chooser:
    """Chooses the tokens of one sequence's drafts, with penalties, bias and seed as `sampler`, which stays untouched.

    By default with the random number that the target will use at that position, so that a draft whose distribution is
    the target's is always right. `draws`: for rejection sampling, with a random number of its own.
    """

    def __init__(self, sampler: Sampler, *, draws: bool = False) -> None:
        params = replace(sampler.params, seed=sampler.seed, logprobs=0)
        self._sampler = Sampler(params, sampler.vocab_size)
        self._draws = draws

    def follow(self, token_ids: Sequence[int], known: int) -> None:
        """The sequence is `token_ids`, whose first `known` tokens are as they were."""
        sampler = self._sampler
        sampler.truncate(min(known, sampler.num_tokens))
        for token_id in token_ids[sampler.num_tokens :]:
            sampler.accept(token_id)

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


def _resized(logits: NDArray[np.float32], vocab_size: int) -> NDArray[np.float32]:
    """Logits for the target's vocabulary: what only the draft has is cut, what it lacks cannot be drafted."""
    if len(logits) >= vocab_size:
        return logits[:vocab_size]
    padded = np.full(vocab_size, -np.inf, np.float32)
    padded[: len(logits)] = logits
    return padded
