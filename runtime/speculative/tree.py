"""Drafts as a pass takes them: a chain as it is, a tree depth first, its likeliest way last.

What is gone through last stays in the cache. Knows nothing of models or chances: of the candidates that follow the same
one, the earlier is taken for likelier.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.speculative.draft import Proposal


@dataclass(frozen=True, slots=True)
class DraftTree:
    """The candidates of a pass by their places there: numbers in the proposal, tokens, the place that each follows."""

    numbers: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    _places: dict[tuple[int, int], int] = field(default_factory=dict)  # of a parent's place and a token

    @classmethod
    def of(cls, proposal: Proposal, count: int) -> "DraftTree":
        """The first `count` candidates of a proposal."""
        children: dict[int, list[int]] = {}
        for number in range(count):
            children.setdefault(proposal.parent(number), []).append(number)
        numbers: list[int] = []
        places = {-1: -1}
        waiting = list(children.get(-1, ()))  # the last one is gone through next
        while waiting:
            number = waiting.pop()
            places[number] = len(numbers)
            numbers.append(number)
            waiting.extend(children.get(number, ()))
        token_ids = [proposal.candidates[number].token_id for number in numbers]
        parents = [places[proposal.parent(number)] for number in numbers]
        by_token = {pair: place for place, pair in enumerate(zip(parents, token_ids, strict=True))}
        return cls(tuple(numbers), tuple(token_ids), tuple(parents), by_token)

    @property
    def branches(self) -> bool:
        """Whether it is more than a chain."""
        return any(parent != place - 1 for place, parent in enumerate(self.parents))

    @property
    def last_way(self) -> list[int]:
        """The places on the way to the last candidate, which is what a cache holds after the pass."""
        way: list[int] = []
        place = len(self.parents) - 1
        while place >= 0:
            way.append(place)
            place = self.parents[place]
        return way[::-1]

    def follow(self, place: int, token_id: int) -> int | None:
        """The place of the candidate behind `place` (-1: the sequence) that is this token."""
        return self._places.get((place, token_id))

    def step_parents(self, before: int) -> Sequence[int]:
        """`Step.parents` where `before` tokens of the sequence come first."""
        return [*range(-1, before - 1), *(before + parent if parent >= 0 else before - 1 for parent in self.parents)]
