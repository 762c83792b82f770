"""Rejection sampling: drafts drawn from their own distribution, accepted so that the answer has the target's.

A token x drafted with chance q(x) is accepted with min(1, p(x) / q(x)), else one is drawn from the positive part of
p - q (Leviathan et al., "Fast inference from transformers via speculative decoding", 2023; Chen et al., 2023). The text
is not the one that plain decoding gives for the same seed, but as probable. Random numbers are those of a position, in
streams of their own, so that a text depends on the seed and the drafts, not on timing within a pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.sampler import Sampled, Sampler, SamplingParams
from runtime.speculative.draft import Candidate

DRAFT_STREAM = 1
ACCEPT_STREAM = 2
REST_STREAM = 3
_STREAM_BITS = 64  # the position counts below them


class RejectionSampler(Sampler):
    """A sampler that accepts what was proposed for a position with its chance; elsewhere it is a plain one."""

    def __init__(self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int] = ()) -> None:
        super().__init__(params, vocab_size, prompt_ids)
        self._proposed: dict[int, Candidate] = {}

    @classmethod
    def of(cls, sampler: Sampler) -> "RejectionSampler":
        """One with the parameters, seed and tokens of `sampler`."""
        made = cls(replace(sampler.params, seed=sampler.seed), sampler.vocab_size)
        for token_id in sampler.token_ids:
            made.accept(token_id)
        return made

    def propose(self, position: int, candidates: Iterable[Candidate]) -> None:
        """What is drafted from `position` on; what was proposed before is forgotten."""
        self._proposed = dict(enumerate(candidates, position))

    def sample(self, logits: NDArray[np.float32], position: int) -> Sampled:
        """See `Sampler`."""
        candidate = self._proposed.get(position)
        if candidate is None or self.params.temperature == 0.0:
            return super().sample(logits, position)
        ids, target = self.distribution(logits, position)
        chances = (uniform(self.seed, position, stream) for stream in (ACCEPT_STREAM, REST_STREAM))
        return self._with_logprobs(accepted_or_rest(candidate, ids, target, *chances), logits)


def accepted_or_rest(
    candidate: Candidate, ids: NDArray[np.int64], target: NDArray[np.float64], accepting: float, resting: float
) -> int:
    """The candidate's token, or one from the rest of the target's distribution `target` over `ids`.

    `accepting` and `resting` are random numbers in [0, 1).
    """
    draft = _over(ids, candidate)
    place = np.flatnonzero(ids == candidate.token_id)
    chance = float(target[place[0]]) if len(place) else 0.0
    if accepting * _chance_of(candidate) < chance:
        return candidate.token_id
    rest = np.maximum(target - draft, 0.0)
    return int(ids[drawn(rest if rest.any() else target, resting)])


def drawn(weights: NDArray[np.float64], number: float) -> int:
    """The index that a random number in [0, 1) draws from `weights` (n,), which need not sum to 1."""
    cumulative = weights.cumsum()
    place = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    return min(place, int(np.flatnonzero(weights)[-1]))


def uniform(seed: int, position: int, stream: int) -> float:
    """The random number in [0, 1) of a position in a stream; stream 0 is the plain sampler's."""
    bits = np.random.Philox(key=seed % 2**64, counter=position + (stream << _STREAM_BITS)).random_raw()
    return float((int(bits) >> 11) * 2.0**-53)


def _chance_of(candidate: Candidate) -> float:
    """With which chance the candidate was drafted."""
    return 1.0 if candidate.probabilities is None else candidate.confidence


def _over(ids: NDArray[np.int64], candidate: Candidate) -> NDArray[np.float64]:
    """The draft's chances of the target's `ids`."""
    if candidate.ids is None or candidate.probabilities is None:
        return np.asarray(ids == candidate.token_id, dtype=np.float64)
    order = np.argsort(candidate.ids)
    known = candidate.ids[order]
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[places] == ids, candidate.probabilities[order][places], 0.0)
