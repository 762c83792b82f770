"""A turn with drafts: what it may do, and what it was.

Knows nothing of how either is decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.speculative.draft import Proposal


@dataclass(frozen=True, slots=True)
class Offer:
    """What a turn may do: drafts at most, computed ones at most, tokens that a draft may read first.

    `tree`: a tree is wanted, of so many drafts at most, `most` behind each other. `tokens_per_s` is what the time is
    worth; `is_probe`: to learn whether drafts pay by now; `idle_tokens`: so many tokens are to be decoded before drafts
    are thought of again.
    """

    most: int = 0
    most_computed: int = 0
    reading_tokens: int = 0
    tokens_per_s: float = 0.0
    is_probe: bool = False
    idle_tokens: int = 0
    tree: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A pass of the target over `verified` candidates of a proposal, and what it took; `accepted` were right.

    `way`: their places in the proposal, where it is a tree. `before`: tokens of the sequence that the pass took first.
    Of a pass over several sequences the times are a sequence's share.
    """

    proposal: Proposal
    verified: int
    accepted: int
    draft_s: float
    verify_s: float
    exchange_s: float = 0.0
    is_probe: bool = False
    way: tuple[int, ...] | None = None
    before: int = 1

    @property
    def tested(self) -> int:
        """Positions with a draft that was put to the test: those before it were right."""
        last = self.right[-1] if self.right else -1
        return self.accepted + any(self.proposal.parent(place) == last for place in range(last + 1, self.verified))

    @property
    def right(self) -> Sequence[int]:
        """The places of the candidates that were right."""
        return range(self.accepted) if self.way is None else self.way

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.draft_s + self.verify_s + self.exchange_s
