"""Drafts by lookup where the sequence repeats itself, by a model elsewhere.

Knows nothing of either but its proposals. Invariant: the model is asked only where the lookup is not sure.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.sampler import Sampler
from runtime.speculative.draft import (
    DraftSource,
    FeatureDraft,
    Guide,
    Proposal,
    SequenceDraft,
    grows_trees,
    on_features,
)

SURE = 0.75  # confidence of a lookup from which the model is not asked: a match of 3 tokens


class MixedSource:
    """`DraftSource` of two others, the second of which costs time."""

    def __init__(self, lookup: DraftSource, model: DraftSource) -> None:
        self.name = f"{lookup.name} and {model.name}"
        self._lookup = lookup
        self._model = model

    def sequence(self, sampler: Sampler, capacity_tokens: int) -> "MixedDraft":
        """See `DraftSource`."""
        return MixedDraft(*(source.sequence(sampler, capacity_tokens) for source in (self._lookup, self._model)))

    def close(self) -> None:
        """See `DraftSource`."""
        self._lookup.close()
        self._model.close()


class MixedDraft:
    """`SequenceDraft` of two others."""

    def __init__(self, lookup: SequenceDraft, model: SequenceDraft) -> None:
        self._lookup = lookup
        self._model = model

    @property
    def has_own_device(self) -> bool:
        """See `SequenceDraft`."""
        return self._model.has_own_device

    @property
    def grows_trees(self) -> bool:
        """See `TreeDraft`."""
        return grows_trees(self._model)

    @property
    def wants_features(self) -> bool:
        """See `FeatureDraft`."""
        return on_features(self._model) is not None

    def observe(self, feature: NDArray[np.float32]) -> None:
        """See `FeatureDraft`."""
        if isinstance(self._model, FeatureDraft):
            self._model.observe(feature)

    def begin(self, token_ids: Sequence[int]) -> None:
        """See `SequenceDraft`."""
        self._lookup.begin(token_ids)
        self._model.begin(token_ids)

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        """See `SequenceDraft`."""
        found = self._lookup.propose(token_ids, guide)
        if found.candidates and found.candidates[0].confidence >= SURE:
            return found
        proposal = self._model.propose(token_ids, guide)
        return proposal if proposal.candidates else found
