"""One sequence decoded with drafts: logits row by row, as plain decoding would compute them, several at a pass.

A pass of the target computes the last token and the drafts behind it; its rows are handed out one by one while the
tokens drawn from them are the drafted ones. Knows nothing of text or sampling. Invariants: every row handed out is that
of plain decoding, bit for bit; after `settle` the cache holds what plain decoding would have left there.
"""

import sys
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.executor.base import Executor, FeatureExecutor, Step
from runtime.generation import Generation
from runtime.speculative.account import Account
from runtime.speculative.ahead import AheadDraft
from runtime.speculative.choosers import Chooser
from runtime.speculative.draft import FeatureDraft, Guide, Proposal, SequenceDraft
from runtime.speculative.policy import Offer, Policy, Turn
from runtime.speculative.rejection import RejectionSampler
from runtime.speculative.totals import Totals

Row = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Passed:
    """The logits behind the last token (vocabulary,), and the pass that was made for them: over `tokens` tokens.

    0 tokens: it was there from the pass before.
    """

    row: Row
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PlainTokens:
    """So many tokens are to be decoded without a thought of drafts."""

    count: int


@dataclass(slots=True)
class _Pass:
    """Rows of a pass, of which `given` were handed out; `start`: tokens of the sequence before it.

    `features` are the hidden states of its tokens, where the draft goes on from them.
    """

    rows: Row
    drafted: list[int]
    turn: Turn
    start: int
    features: Row | None = None
    given: int = 1


class SpeculativeSequence:
    """The state of one sequence; all but `executor` and `policy` is its own."""

    def __init__(
        self, executor: Executor, draft: SequenceDraft, policy: Policy, chooser: Chooser, account: Account
    ) -> None:
        self._account = account
        self._draft: SequenceDraft | None = AheadDraft(draft) if draft.has_own_device else draft
        self._executor = executor
        self._policy = policy
        self._chooser = chooser
        self._pass: _Pass | None = None
        self._known = 0
        self._feature: Row | None = None
        self._idle_from: int | None = None  # tokens of the sequence when drafts were put off

    def next(self, generation: Generation, totals: Totals) -> Passed | PlainTokens:
        """The logits for the next token, or how many are best decoded plainly, elsewhere, from here on.

        What a draft raises is logged, and the sequence goes on without.
        """
        row = self._from_pass(generation)
        if row is not None:
            return Passed(row)
        started = time.perf_counter()
        self.settle(generation, totals)
        session = generation.session
        room = min(generation.tokens_left, session.kv.capacity_tokens - session.kv.length) - 1
        offer = self._policy.offer(self._account, room)
        if offer.idle_tokens or self._draft is None:
            self._idle_from = len(session.token_ids)
            return PlainTokens(offer.idle_tokens or sys.maxsize)
        proposal, draft_s = self._propose(session.token_ids, offer, totals)
        verified = self._policy.worth_verifying(offer, proposal)
        drafted = proposal.token_ids[:verified]
        position = len(session.token_ids)
        if isinstance(generation.sampler, RejectionSampler):
            generation.sampler.propose(position, proposal.candidates[:verified])
        if verified:
            self._go_on([*session.token_ids, *drafted], offer, proposal)
        verifying = time.perf_counter()
        tokens = [session.token_ids[-1], *drafted]
        rows = self._executor.forward([Step(tokens, session.kv)], logits="all")[0]
        ended = time.perf_counter()
        verify_s = ended - verifying
        exchange_s = max(verifying - started - draft_s, 0.0)
        turn = Turn(proposal, verified, 0, draft_s, verify_s, exchange_s, offer.is_probe)
        self._pass = _Pass(rows, drafted, turn, position, self._features(len(tokens), totals))
        return Passed(rows[0], len(tokens), ended - started)

    def settle(self, generation: Generation, totals: Totals) -> None:
        """Forget the rows behind the sequence's end, and learn from the pass that they came from."""
        session, made = generation.session, self._pass
        session.kv.truncate(min(session.kv.length, len(session.token_ids) - 1))
        self._pass = None
        if isinstance(generation.sampler, RejectionSampler):
            generation.sampler.propose(0, ())
        if self._idle_from is not None:
            idled = len(session.token_ids) - self._idle_from
            totals.add_idle(idled)
            self._policy.idled(idled, self._account)
            self._idle_from = None
        self._feature = None
        if made is not None:
            self._feature = None if made.features is None else made.features[made.given - 1]
            turn = replace(made.turn, accepted=made.given - 1)
            self._policy.record(turn, self._account)
            totals.add(turn)
            totals.plain_token_s = self._policy.times.seconds(1)

    def end(self, generation: Generation, totals: Totals) -> None:
        """The answer is over, or goes on without drafts."""
        self.settle(generation, totals)
        self._policy.ended(self._account)
        if isinstance(self._draft, AheadDraft):
            self._draft.close()

    def _from_pass(self, generation: Generation) -> Row | None:
        """The next row of the last pass, if the token before it is the drafted one."""
        made, token_ids = self._pass, generation.session.token_ids
        if made is None or made.given > len(made.drafted) or len(token_ids) != made.start + made.given:
            return None
        if token_ids[-1] != made.drafted[made.given - 1]:
            return None
        made.given += 1
        row: Row = made.rows[made.given - 1]
        return row

    def _propose(self, token_ids: list[int], offer: Offer, totals: Totals) -> tuple[Proposal, float]:
        """What the draft proposes, and the seconds it took."""
        if self._draft is None or not offer.most:
            return Proposal(), 0.0
        started = time.perf_counter()
        try:
            if isinstance(self._draft, AheadDraft):
                self._draft.settle()
            if (follower := _on_features(self._draft)) is not None:
                follower.observe(self._last_feature())
            proposal = self._draft.propose(token_ids, self._guide(token_ids, offer))
            self._known = len(token_ids)
        except Exception as error:  # noqa: BLE001 - whatever befalls a draft, the answer does not depend on it
            self._leave_draft(error, totals)
            return Proposal(), time.perf_counter() - started
        return proposal, time.perf_counter() - started

    def _features(self, tokens: int, totals: Totals) -> Row | None:
        """Hidden states of the pass that was just made, for a draft that wants them."""
        if _on_features(self._draft) is None or not isinstance(self._executor, FeatureExecutor):
            return None
        try:
            return self._executor.features(tokens)
        except ValueError as error:  # the pass was made in parts: too few experts find a place
            self._leave_draft(error, totals)
            return None

    def _leave_draft(self, error: Exception, totals: Totals) -> None:
        totals.fail(error)
        if isinstance(self._draft, AheadDraft):
            self._draft.close()
        self._draft = None

    def _last_feature(self) -> Row:
        """The hidden state of the sequence's last computed token; that of the last run after plain decoding."""
        if self._feature is None:
            assert isinstance(self._executor, FeatureExecutor), "checked where the draft was made"
            self._feature = self._executor.features(1)[0]
        return self._feature

    def _go_on(self, token_ids: list[int], offer: Offer, proposal: Proposal) -> None:
        """Let a draft with a device of its own work while the target verifies."""
        if isinstance(self._draft, AheadDraft) and proposal.is_computed:
            self._draft.go_on(token_ids, self._guide(token_ids, offer))

    def _guide(self, token_ids: list[int], offer: Offer) -> Guide:
        self._chooser.follow(token_ids, self._known)
        goes_on = self._policy.goes_on(offer)
        return Guide(offer.most, offer.most_computed, offer.reading_tokens, goes_on, self._chooser.choose)


def _on_features(draft: object) -> FeatureDraft | None:
    """The draft, if it goes on from the target's hidden states."""
    return draft if isinstance(draft, FeatureDraft) and draft.wants_features else None
