"""Drafts by a head on the target's own hidden states: they are foretold token by token, the target's output reads them.

From the hidden state F of a token (behind the output norm) and the embedding e of the next, Dovetail's gate (Dynamic
Gating Fusion) makes h1 = F W1, h2 = SiLU(RMSNorm(e) W2), z = sigmoid([h1; h2] Wz), h = z h1 + (1 - z) h2; a residual
feed-forward part follows, h + SiLU(RMSNorm(h) Wu) Wd, which is the next token's hidden state. Its product with the
output matrix gives logits. Knows nothing of files of models. Trained by scripts/train_draft.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from offload.errors import ModelFormatError, RequestError
from runtime.sampler import Sampler
from runtime.speculative.draft import Candidate, Guide, Proposal

SUFFIX = ".npz"
EPSILON = 1e-6
Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """Matrices as rows of inputs by columns of outputs; d is the target's width, f the feed-forward part's.

    `output` (vocabulary, d) is the target's own; `embedding` (vocabulary, d) may be the same.
    """

    w1: Matrix  # (d, d)
    w2: Matrix  # (d, d)
    wz: Matrix  # (2 d, d)
    wu: Matrix  # (d, f)
    wd: Matrix  # (f, d)
    embedding: Matrix
    output: Matrix

    @classmethod
    def load(cls, path: Path) -> "HeadWeights":
        """Reads a head; ModelFormatError for a file that is none."""
        try:
            with np.load(path, allow_pickle=False) as file:
                made = cls(*(np.asarray(file[one.name], np.float32) for one in fields(cls)))
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise ModelFormatError(f"{path} is no draft head: {error}", hint="train one with train_draft.py") from error
        made.check(path)
        return made

    def check(self, path: Path) -> None:
        """ModelFormatError where shapes do not go together or a weight is no number."""
        width = self.w1.shape[-1]
        inner = self.wu.shape[-1]
        expected = [(width, width), (width, width), (2 * width, width), (width, inner), (inner, width)]
        found = [getattr(self, one.name) for one in fields(self)]
        tables = all(table.ndim == 2 and table.shape[1] == width for table in found[5:])
        if [one.shape for one in found[:5]] != expected or not tables or self.output.shape != self.embedding.shape:
            raise ModelFormatError(f"{path}: the shapes of a draft head do not go together")
        if not all(np.isfinite(one).all() for one in found):
            raise ModelFormatError(f"{path}: a weight of the draft head is not a number")

    def next_feature(self, feature: NDArray[np.float32], token_id: int) -> NDArray[np.float32]:
        """The hidden state (d,) of `token_id` behind a token with hidden state `feature`."""
        first = feature @ self.w1
        second = _silu(_normed(self.embedding[token_id]) @ self.w2)
        gate = _sigmoid(np.concatenate([first, second]) @ self.wz)
        fused: NDArray[np.float32] = gate * first + (1 - gate) * second
        found: NDArray[np.float32] = fused + _silu(_normed(fused) @ self.wu) @ self.wd
        return found

    def logits(self, feature: NDArray[np.float32]) -> NDArray[np.float32]:
        """(vocabulary,) of a hidden state."""
        found: NDArray[np.float32] = self.output @ feature
        return found


class HeadSource:
    """`DraftSource` by a head for a target of that width and vocabulary; RequestError for another."""

    def __init__(self, path: Path, *, width: int, vocab_size: int) -> None:
        self.name = path.name
        self._weights = HeadWeights.load(path)
        own = self._weights.output.shape
        if own != (vocab_size, width):
            raise RequestError(
                f"{path.name} is a head for {own[0]} tokens and a width of {own[1]}; "
                f"the model has {vocab_size} and {width}",
                hint="train one for this model with train_draft.py",
            )

    def sequence(self, sampler: Sampler, capacity_tokens: int) -> "HeadDraft":
        """See `DraftSource`."""
        return HeadDraft(self._weights, self.name)

    def close(self) -> None:
        """Nothing is held open."""


class HeadDraft:
    """`SequenceDraft` and `FeatureDraft`; it keeps no cache."""

    has_own_device = False
    wants_features = True

    def __init__(self, weights: HeadWeights, name: str) -> None:
        self._weights = weights
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
            feature = self._weights.next_feature(feature, token_id)
            candidates.append(guide.choose(self._weights.logits(feature), len(token_ids) + len(candidates)))
            if len(candidates) == most or not guide.goes_on(self._name, candidates[-1].confidence):
                return Proposal(tuple(candidates), self._name, is_computed=True)
            token_id = candidates[-1].token_id


def _normed(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """RMS norm without weights."""
    found: NDArray[np.float32] = row / np.sqrt(np.mean(row * row) + np.float32(EPSILON))
    return found


def _sigmoid(row: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (1 / (1 + np.exp(-row))).astype(np.float32, copy=False)
    return found


def _silu(row: NDArray[np.float32]) -> NDArray[np.float32]:
    return row * _sigmoid(row)
