"""What a source of drafts is: tokens proposed for the end of a sequence, each with the chance that its source gives it.

Knows nothing about how drafts are verified. Invariant: whatever a source proposes, the answer is the target's own;
a bad draft costs time alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from runtime.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Candidate:
    """A drafted token; `confidence` is its chance by the source's own account, before it is calibrated.

    `rank`: how many its source proposes in its place before it. `ids` and `probabilities` are what it was drawn from,
    where the draft was asked for it; None: it was certain.
    """

    token_id: int
    confidence: float
    ids: NDArray[np.int64] | None = None
    probabilities: NDArray[np.float64] | None = None
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Proposal:
    """What `source` proposes to follow a sequence; reading what it had not seen took `read_s` seconds.

    `is_computed`: candidates cost computations, as by a model, as many as there are or `steps`; else they were there at
    once. `parents`: they are a tree; of each the place of the one it follows, which stands before it, or -1.
    """

    candidates: tuple[Candidate, ...] = ()
    source: str = ""
    is_computed: bool = False
    read_tokens: int = 0
    read_s: float = 0.0
    parents: tuple[int, ...] | None = None
    steps: int | None = None

    @property
    def token_ids(self) -> list[int]:
        """The drafted tokens."""
        return [candidate.token_id for candidate in self.candidates]

    @property
    def computed(self) -> int:
        """Computations that were made for the candidates."""
        if not self.is_computed:
            return 0
        return len(self.candidates) if self.steps is None else self.steps

    def parent(self, place: int) -> int:
        """The place of the candidate that one follows, or -1."""
        return place - 1 if self.parents is None else self.parents[place]


Choose = Callable[[NDArray[np.float32], int], Candidate]
"""Takes (logits (vocabulary,), position) and returns what to draft there."""


ChooseSeveral = Callable[[Sequence[int], NDArray[np.float32]], Sequence[Candidate]]
"""Takes (drafted tokens on the way, logits (vocabulary,) behind them); returns what to draft there, by rank."""


GoesOn = Callable[[str, float], bool]


@dataclass(frozen=True, slots=True)
class TreeGuide:
    """How a tree is grown: to `most` candidates, `most_depth` behind each other.

    `chance` takes the source's name and a candidate: that it is right if those it follows are. `worth_a_place` and
    `worth_a_step` take the chance that a candidate counts and how many there are: whether to verify it, and whether to
    compute what may follow it.
    """

    most: int
    most_depth: int
    choose: ChooseSeveral
    chance: Callable[[str, Candidate], float]
    worth_a_place: Callable[[float, int], bool]
    worth_a_step: Callable[[float, int], bool]


@dataclass(frozen=True, slots=True)
class Guide:
    """What a source is asked for: at most `most` tokens, `most_computed` where each costs a computation.

    `goes_on` takes the source's name and the confidence of each computed candidate, and says whether another is worth
    its time; `reading_tokens` is how many tokens, that it has not seen, a source may read first. With `tree` a source
    that can (`TreeDraft`) proposes one.
    """

    most: int
    most_computed: int
    reading_tokens: int
    goes_on: GoesOn
    choose: Choose
    tree: TreeGuide | None = None


class SequenceDraft(Protocol):
    """Drafts for one sequence."""

    @property
    def has_own_device(self) -> bool:
        """Whether it computes on a device that the target does not use."""
        ...

    def begin(self, token_ids: Sequence[int]) -> None:
        """An answer begins: the sequence is this from now on, and only grows."""
        ...

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        """What may follow `token_ids`, which begin with what earlier calls were given; may be empty."""
        ...


@runtime_checkable
class TreeDraft(Protocol):
    """A draft that may propose trees."""

    @property
    def grows_trees(self) -> bool:
        """Whether it does."""
        ...


@runtime_checkable
class FeatureDraft(Protocol):
    """A draft that may go on from the target's own hidden states."""

    @property
    def wants_features(self) -> bool:
        """Whether it does."""
        ...

    def observe(self, feature: NDArray[np.float32]) -> None:
        """That of the sequence's last computed token, the one before its last, (width,), before each proposal."""
        ...


def on_features(draft: object) -> FeatureDraft | None:
    """The draft, if it goes on from the target's hidden states."""
    return draft if isinstance(draft, FeatureDraft) and draft.wants_features else None


def grows_trees(draft: object) -> bool:
    """Whether a draft proposes trees."""
    return isinstance(draft, TreeDraft) and draft.grows_trees


class DraftSource(Protocol):
    """Where drafts come from, for any number of sequences."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def sequence(self, sampler: Sampler, capacity_tokens: int) -> SequenceDraft:
        """Drafts for a sequence of up to that many tokens, whose tokens `sampler` draws."""
        ...

    def close(self) -> None:
        """Frees what it holds; may be called twice."""
        ...
