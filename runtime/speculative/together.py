"""Several sequences decoded together with drafts: all of their drafts are verified in one pass, each is given its own.

Knows nothing of text. Invariants: as for one sequence; the time that drafts may lose is bounded for as many sequences
as there are, by an account of their own.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.executor.base import Executor, TreeExecutor
from runtime.generation import Generation, Piece
from runtime.speculative.account import Account
from runtime.speculative.policy import Policy
from runtime.speculative.sequence import SpeculativeSequence
from runtime.speculative.totals import Totals

Running = Sequence[tuple[Generation, SpeculativeSequence]]


@dataclass(frozen=True, slots=True)
class Group:
    """What holds for so many sequences at once."""

    lanes: int
    policy: Policy
    account: Account


class Together:
    """Passes of `executor` over several sequences; `policy` is that of one alone."""

    def __init__(self, executor: Executor, policy: Policy) -> None:
        self._executor = executor
        self._policy = policy
        self._groups: dict[int, Group] = {}

    def group(self, lanes: int) -> Group | None:
        """That of so many sequences; None where a pass does not take a draft for each."""
        executor = self._executor
        if not isinstance(executor, TreeExecutor) or executor.most_pass_tokens < 2 * lanes:
            return None
        if lanes not in self._groups:
            self._groups[lanes] = Group(lanes, self._policy.for_lanes(lanes), Account())
        return self._groups[lanes]

    def step(self, group: Group, running: Running, totals: Totals) -> list[Piece | None] | int:
        """A pass, and the last token that each sequence got of it; or how many passes are best made without drafts."""
        assert isinstance(self._executor, TreeExecutor), "else there is no group"
        started = time.perf_counter()
        rooms = [sequence.room(generation) for generation, sequence in running]
        room = min(max(rooms), self._executor.most_pass_tokens // group.lanes - 1)
        offer = group.policy.offer(group.account, room)
        if offer.idle_tokens:
            return offer.idle_tokens
        for _, sequence in running:
            sequence.rest(totals)
        made = []
        for (generation, sequence), own in zip(running, rooms, strict=True):
            most = min(offer.most, own)
            bounded = replace(offer, most=most, most_computed=min(offer.most_computed, most))
            made.append(sequence.prepare(generation, group.policy, bounded, totals, started))
            started = time.perf_counter()
        steps = [sequence.step(generation, each) for (generation, sequence), each in zip(running, made, strict=True)]
        verifying = time.perf_counter()
        rows = self._executor.forward(steps, logits="all")
        ended = time.perf_counter()
        verify_s = (ended - verifying) / group.lanes
        tokens = sum(len(step.token_ids) for step in steps)
        totals.took("verify", verifying, ended, tokens=tokens, sequences=group.lanes)
        for (_, sequence), each, own_rows in zip(running, made, rows, strict=True):
            sequence.passed(each, own_rows, verify_s)
        pieces = [self._take(generation, sequence) for generation, sequence in running]
        turns = [sequence.taken(generation, group.policy, totals, group.lanes) for generation, sequence in running]
        group.policy.record([turn for turn in turns if turn is not None], group.account)
        totals.plain_took(group.policy.plain_s / group.lanes, group.lanes)
        return pieces

    @staticmethod
    def _take(generation: Generation, sequence: SpeculativeSequence) -> Piece | None:
        """All tokens that a sequence got of the pass."""
        piece = generation.advance(sequence.first_row())
        while not generation.finished and (row := sequence.row(generation)) is not None:
            piece = generation.advance(row)
        return piece
