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
MOST_PLACES = 64  # of the newest two tokens that are looked at


class NGramSource:
    """`DraftSource` by lookup."""

    name = NAME

    def sequence(self, sampler: Sampler, capacity_tokens: int) -> "NGramDraft":
        """See `DraftSource`."""
        return NGramDraft()

    def close(self) -> None:
        """Nothing is held."""


class NGramDraft:
    """`SequenceDraft` by lookup of the last 5 to 2 tokens; the newest of several matches.

    Positions after the same two tokens are linked, newest first, as LZ77 coders do: a token costs one look-up.
    """

    has_own_device = False

    def __init__(self) -> None:
        self._newest: dict[tuple[int, int], int] = {}  # two tokens -> the last position after them
        self._before: list[int] = []  # of each position the one before it after the same two tokens, or 0

    def begin(self, token_ids: Sequence[int]) -> None:
        """See `SequenceDraft`."""
        self._newest.clear()
        self._before.clear()
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
        """Learn the positions that have a token and at least two before it."""
        newest, before = self._newest, self._before
        for end in range(len(before), len(token_ids)):
            pair = (token_ids[end - 2], token_ids[end - 1]) if end >= SHORTEST else None
            before.append(0 if pair is None else newest.get(pair, 0))
            if pair is not None:
                newest[pair] = end

    def _find(self, token_ids: Sequence[int]) -> int | None:
        """The position after the newest earlier place of the longest n-gram that ends the sequence."""
        length = len(token_ids)
        if length < SHORTEST:
            return None
        end = self._newest.get((token_ids[-2], token_ids[-1]), 0)
        best, longest = None, SHORTEST - 1
        for _ in range(MOST_PLACES):
            if not end:
                break
            count = SHORTEST
            while count < min(LONGEST, end) and token_ids[end - 1 - count] == token_ids[length - 1 - count]:
                count += 1
            if count > longest:
                best, longest = end, count
            if count == LONGEST:
                break
            end = self._before[end]
        return best

    @staticmethod
    def _matched(token_ids: Sequence[int], end: int) -> int:
        """Tokens before `end` that equal the last ones of the sequence."""
        count = 0
        while count < min(end, MOST_COMPARED) and token_ids[end - 1 - count] == token_ids[-1 - count]:
            count += 1
        return count
