"""Drafts by a head on the target's own hidden states: they are foretold token by token, the target's output reads them.

Both on the target's own threads, with its own output head. Knows nothing of files of models, nor of a head's arithmetic
(`HeadProgram`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.errors import RequestError
from runtime.executor.base import FeatureExecutor
from runtime.sampler import Sampler
from runtime.speculative.draft import Candidate, Guide, Proposal
from runtime.speculative.head_program import HeadProgram
from runtime.speculative.head_weights import HeadWeights


class HeadSource:
    """`DraftSource` by a head for the model of `executor`; RequestError for a head of another width or vocabulary."""

    def __init__(self, path: Path, executor: FeatureExecutor, *, width: int, vocab_size: int) -> None:
        self.name = path.name
        weights = HeadWeights.load(path)
        if (weights.vocab_size, weights.width) != (vocab_size, width):
            raise RequestError(
                f"{path.name} is a head for {weights.vocab_size} tokens and a width of {weights.width}; "
                f"the model has {vocab_size} and {width}",
                hint="train one for this model with train_draft.py",
            )
        self._executor = executor
        self._head = HeadProgram(weights)

    def sequence(self, sampler: Sampler, capacity_tokens: int) -> "HeadDraft":
        """See `DraftSource`."""
        return HeadDraft(self._head, self._executor, self.name)

    def close(self) -> None:
        """Nothing is held open."""


class HeadDraft:
    """`SequenceDraft` and `FeatureDraft`; it keeps no cache."""

    has_own_device = False
    wants_features = True

    def __init__(self, head: HeadProgram, executor: FeatureExecutor, name: str) -> None:
        self._head = head
        self._executor = executor
        self._name = name
        self._feature: NDArray[np.float32] | None = None

    def observe(self, feature: NDArray[np.float32]) -> None:
        """See `FeatureDraft`."""
        self._feature = feature

    def begin(self, token_ids: Sequence[int]) -> None:
        """See `SequenceDraft`."""
        self._feature = None

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        """See `SequenceDraft`."""
        most = min(guide.most, guide.most_computed)
        if most < 1 or self._feature is None:
            return Proposal(source=self._name)
        feature, token_id = self._feature, token_ids[-1]
        candidates: list[Candidate] = []
        while True:
            self._head.put(feature, token_id)
            self._executor.compute(self._head.program)
            feature = self._head.feature()
            row = self._executor.read_features(feature[None])[0]
            candidates.append(guide.choose(row, len(token_ids) + len(candidates)))
            if len(candidates) == most or not guide.goes_on(self._name, candidates[-1].confidence):
                return Proposal(tuple(candidates), self._name, is_computed=True)
            token_id = candidates[-1].token_id
