"""One sequence decoded with drafts: logits row by row, as plain decoding would compute them, several at a pass.

A pass of the target computes the last token and the drafts behind it; its rows are handed out one by one while the
tokens drawn from them are drafted ones. Knows nothing of text or sampling. Invariants: every row handed out is that of
plain decoding, bit for bit; after `settle` the cache holds rows that plain decoding would have left there, all of them
unless a tree's accepted way was not its last: then the next pass computes those that are missing.
"""

import sys
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.executor.base import Executor, FeatureExecutor, Step, TreeExecutor
from runtime.generation import Generation
from runtime.speculative.account import Account
from runtime.speculative.ahead import AheadDraft
from runtime.speculative.choosers import Chooser
from runtime.speculative.draft import Guide, Proposal, SequenceDraft, grows_trees, on_features
from runtime.speculative.policy import Policy
from runtime.speculative.rejection import RejectionSampler
from runtime.speculative.totals import Totals
from runtime.speculative.tree import DraftTree
from runtime.speculative.turn import Offer, Turn

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


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is to be verified behind a sequence of `start` tokens, the last `before` of which the pass takes first."""

    tree: DraftTree
    proposal: Proposal
    offer: Offer
    start: int
    before: int
    draft_s: float
    exchange_s: float


@dataclass(slots=True)
class _Pass:
    """A pass and its rows; `way`: places in the tree of the drafted tokens that were drawn.

    `features` are the hidden states of its tokens, where the draft goes on from them.
    """

    made: Prepared
    rows: Row
    verify_s: float
    features: Row | None = None
    way: list[int] = field(default_factory=list)

    @property
    def row(self) -> int:
        """The number of the row that was handed out last."""
        return self.made.before + (self.way[-1] if self.way else -1)

    @property
    def turn(self) -> Turn:
        """What it came to."""
        made = self.made
        way = tuple(made.tree.numbers[place] for place in self.way)
        times = (made.draft_s, self.verify_s, made.exchange_s)
        is_probe, verified = made.offer.is_probe, len(made.tree.numbers)
        return Turn(made.proposal, verified, len(way), *times, is_probe, way=way, before=made.before)

    @property
    def kept(self) -> int:
        """Tokens of the sequence whose rows the cache holds."""
        last, count = self.made.tree.last_way, 0
        while count < len(self.way) and self.way[count] == last[count]:
            count += 1
        return self.made.start + count


class SpeculativeSequence:
    """The state of one sequence; all but `executor` is its own."""

    def __init__(self, executor: Executor, draft: SequenceDraft, chooser: Chooser, account: Account) -> None:
        self.account = account
        self._draft: SequenceDraft | None = AheadDraft(draft) if draft.has_own_device else draft
        self._executor = executor
        self._chooser = chooser
        self._pass: _Pass | None = None
        self._known = 0
        self._feature: Row | None = None
        self._idle_from: int | None = None  # tokens of the sequence when drafts were put off

    def next(self, generation: Generation, policy: Policy, totals: Totals) -> Passed | PlainTokens:
        """The logits for the next token, or how many are best decoded plainly, elsewhere, from here on.

        What a draft raises is logged, and the sequence goes on without.
        """
        row = self.row(generation)
        if row is not None:
            return Passed(row)
        started = time.perf_counter()
        self.settle(generation, policy, totals)
        offer = policy.offer(self.account, self.room(generation), self._tree_room(generation))
        if offer.idle_tokens or self._draft is None:
            return PlainTokens(self.put_off(generation, offer))
        made = self.prepare(generation, policy, offer, totals, started)
        step = self.step(generation, made)
        verifying = time.perf_counter()
        rows = self._executor.forward([step], logits="all")[0]
        ended = time.perf_counter()
        totals.took("verify", verifying, ended, tokens=len(rows), drafts=len(made.tree.numbers))
        self.passed(made, rows, ended - verifying, self._features(len(rows), totals))
        return Passed(rows[made.before - 1], len(rows), ended - started)

    @staticmethod
    def room(generation: Generation) -> int:
        """Drafts behind each other that can be of use."""
        kv = generation.session.kv
        return min(generation.tokens_left, kv.capacity_tokens - len(generation.session.token_ids) + 1) - 1

    def put_off(self, generation: Generation, offer: Offer) -> int:
        """Drafts are put off from here on; for so many tokens."""
        self._idle_from = len(generation.session.token_ids)
        return offer.idle_tokens or sys.maxsize

    def prepare(self, generation: Generation, policy: Policy, offer: Offer, totals: Totals, started: float) -> Prepared:
        """What to verify, by what the draft proposes; this began at `started`, by `time.perf_counter`."""
        token_ids = generation.session.token_ids
        proposal, draft_s = self._propose(token_ids, policy, offer, totals)
        tree = DraftTree.of(proposal, policy.worth_verifying(offer, proposal))
        if isinstance(generation.sampler, RejectionSampler):
            generation.sampler.propose(len(token_ids), proposal.candidates[: len(tree.numbers)])
        ahead = self._draft if policy.lanes == 1 else None  # several sequences share the draft's device
        if isinstance(ahead, AheadDraft) and tree.numbers and proposal.is_computed:
            way = [*token_ids, *(tree.token_ids[place] for place in tree.last_way)]
            ahead.go_on(way, self._guide(way, policy, offer))
        before = len(token_ids) - generation.session.kv.length
        ended = time.perf_counter()
        exchange_s = max(ended - started - draft_s, 0.0)
        totals.took("exchange", ended - exchange_s, ended)
        return Prepared(tree, proposal, offer, len(token_ids), before, draft_s, exchange_s)

    @staticmethod
    def step(generation: Generation, made: Prepared) -> Step:
        """The target's step for it."""
        session, tree = generation.session, made.tree
        tokens = [*session.token_ids[-made.before :], *tree.token_ids]
        return Step(tokens, session.kv, tree.step_parents(made.before) if tree.branches else None)

    def passed(self, made: Prepared, rows: Row, verify_s: float, features: Row | None = None) -> None:
        """The target has computed the step."""
        self._pass = _Pass(made, rows, verify_s, features)

    def row(self, generation: Generation) -> Row | None:
        """The next row of the last pass, if the token before it is a drafted one."""
        held, token_ids = self._pass, generation.session.token_ids
        if held is None or len(token_ids) != held.made.start + len(held.way) + 1:
            return None
        place = held.made.tree.follow(held.way[-1] if held.way else -1, token_ids[-1])
        if place is None:
            return None
        held.way.append(place)
        row: Row = held.rows[held.row]
        return row

    def first_row(self) -> Row:
        """The row behind the sequence's end, of the pass that was just made."""
        assert self._pass is not None, "a pass was made"
        row: Row = self._pass.rows[self._pass.row]
        return row

    def settle(self, generation: Generation, policy: Policy, totals: Totals) -> None:
        """Forget the rows behind the sequence's end, and learn from the pass that they came from."""
        turn = self.taken(generation, policy, totals)
        if turn is not None:
            policy.record([turn], self.account)
            totals.plain_took(policy.plain_s)

    def taken(self, generation: Generation, policy: Policy, totals: Totals, lanes: int = 1) -> Turn | None:
        """`settle` without learning from the last turn, one of so many, which is given back, if there was one."""
        session, held = generation.session, self._pass
        kept = session.kv.length if held is None else held.kept
        session.kv.truncate(min(session.kv.length, kept, len(session.token_ids) - 1))
        self._pass = None
        if isinstance(generation.sampler, RejectionSampler):
            generation.sampler.propose(0, ())
        if self._idle_from is not None:
            idled = len(session.token_ids) - self._idle_from
            totals.add_idle(idled)
            policy.idled(idled, self.account)
            self._idle_from = None
        self._feature = None
        if held is None:
            return None
        self._feature = None if held.features is None else held.features[held.row]
        totals.add(held.turn, lanes)
        return held.turn

    def end(self, generation: Generation, policy: Policy, totals: Totals) -> None:
        """The answer is over, or goes on without drafts."""
        self.settle(generation, policy, totals)
        policy.ended(self.account)
        if isinstance(self._draft, AheadDraft):
            self._draft.close()

    def rest(self, totals: Totals) -> None:
        """Wait until a draft with a device of its own is idle."""
        if isinstance(self._draft, AheadDraft):
            try:
                self._draft.settle()
            except Exception as error:  # noqa: BLE001 - whatever befalls a draft, the answer does not depend on it
                self._leave_draft(error, totals)

    def _tree_room(self, generation: Generation) -> int:
        """Drafts that a tree may have; 0 where none can be verified."""
        draft, executor = self._draft, self._executor
        if not grows_trees(draft) or not isinstance(executor, TreeExecutor):
            return 0
        if isinstance(generation.sampler, RejectionSampler):  # what it accepts is one draft after the other
            return 0
        session = generation.session
        return max(executor.most_pass_tokens - (len(session.token_ids) - session.kv.length), 0)

    def _propose(self, token_ids: list[int], policy: Policy, offer: Offer, totals: Totals) -> tuple[Proposal, float]:
        """What the draft proposes, and the seconds it took."""
        if self._draft is None or not offer.most:
            return Proposal(), 0.0
        started = time.perf_counter()
        try:
            if isinstance(self._draft, AheadDraft):
                self._draft.settle()
            if (follower := on_features(self._draft)) is not None:
                follower.observe(self._last_feature())
            proposal = self._draft.propose(token_ids, self._guide(token_ids, policy, offer))
            self._known = len(token_ids)
        except Exception as error:  # noqa: BLE001 - whatever befalls a draft, the answer does not depend on it
            self._leave_draft(error, totals)
            return Proposal(), time.perf_counter() - started
        ended = time.perf_counter()
        totals.took("draft", started, ended, drafts=len(proposal.candidates))
        return proposal, ended - started

    def _features(self, tokens: int, totals: Totals) -> Row | None:
        """Hidden states of the pass that was just made, for a draft that wants them."""
        if on_features(self._draft) is None or not isinstance(self._executor, FeatureExecutor):
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

    def _guide(self, token_ids: list[int], policy: Policy, offer: Offer) -> Guide:
        chooser = self._chooser
        chooser.follow(token_ids, self._known)
        tree = policy.tree_guide(offer, chooser.choose_several)
        return Guide(offer.most, offer.most_computed, offer.reading_tokens, policy.goes_on(offer), chooser.choose, tree)
