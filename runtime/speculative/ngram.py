"""Drafts without a model: what followed the last time that the sequence's newest tokens stood in it.

(Saxena, "Prompt lookup decoding", 2023.) Pays where answers repeat their prompt or themselves: summaries, edits of
code, quotations. Knows nothing about models. Invariant: a proposal is a function of the sequence alone.
"""

from collections.abc import Sequence

from runtime.sampler import Sampler
from runtime.speculative.draft import Candidate, Guide, Proposal

NAME = "n-gram"
LONGEST = 5
SHORTEST = 2
MOST_COMPARED = 32  # tokens back from a match, for its confidence


class NGramSource:
    """`DraftSource` by lookup."""

    name = NAME

    def sequence(self, sampler: Sampler, capacity_tokens: int) -> "NGramDraft":
        """See `DraftSource`."""
        return NGramDraft()

    def close(self) -> None:
        """Nothing is held."""


class NGramDraft:
    """`SequenceDraft` by lookup of the last 5 to 2 tokens; the newest of several matches."""

    has_own_device = False

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> position after it
        self._indexed = 0  # n-grams that end at or before this position are known

    def begin(self, token_ids: Sequence[int]) -> None:
        """See `SequenceDraft`."""
        self._ends.clear()
        self._indexed = 0
        self._index(token_ids)

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        """See `SequenceDraft`. The further a match reaches back, the surer it is: m tokens count as m / (m + 1)."""
        self._index(token_ids)
        found = self._find(token_ids)
        if found is None:
            return Proposal(source=NAME)
        matched = self._matched(token_ids, found)
        drafted: list[int] = []
        for place in range(found, found + guide.most):  # beyond the end it goes on with itself
            drafted.append(token_ids[place] if place < len(token_ids) else drafted[place - len(token_ids)])
        return Proposal(
            tuple(
                Candidate(token_id, (matched + index) / (matched + index + 1)) for index, token_id in enumerate(drafted)
            ),
            NAME,
        )

    def _index(self, token_ids: Sequence[int]) -> None:
        """Learn the n-grams that are followed by a token."""
        ends = self._ends
        for end in range(max(self._indexed + 1, SHORTEST), len(token_ids)):
            tail = tuple(token_ids[max(0, end - LONGEST) : end])
            for length in range(SHORTEST, len(tail) + 1):
                ends[tail[-length:]] = end
        self._indexed = max(self._indexed, len(token_ids) - 1)

    def _find(self, token_ids: Sequence[int]) -> int | None:
        """The position after the newest earlier place of the longest n-gram that ends the sequence."""
        tail = tuple(token_ids[-LONGEST:])
        for length in range(len(tail), SHORTEST - 1, -1):
            found = self._ends.get(tail[-length:])
            if found is not None:
                return found
        return None

    @staticmethod
    def _matched(token_ids: Sequence[int], end: int) -> int:
        """Tokens before `end` that equal the last ones of the sequence."""
        count = 0
        while count < min(end, MOST_COMPARED) and token_ids[end - 1 - count] == token_ids[-1 - count]:
            count += 1
        return count
