"""When to draft and how much: the cost model fed with live measurements, within what an answer's account allows.

One policy serves all sequences of an engine, so that an answer begins with what earlier ones taught. Knows nothing of
tokens' meaning; reads no clock. Invariants: with `is_forced` every draft is verified; without, a turn whose worst case
the account does not cover is not begun, and one that is not expected to pay is begun only as a probe.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.draft_depth import Costs, best_depth, worth_verifying
from runtime.speculative.account import Account
from runtime.speculative.draft import Candidate, GoesOn, Proposal
from runtime.speculative.estimates import Acceptance, Calibration, PassTimes, RunningMean

FIRST_PLAIN = 2  # tokens without drafts before the first: what they must beat is measured
REFRESH_TOKENS = 128  # after which a plain token's time is measured again
PROBE_DRAFTS = 3
LEAST_CREDIT = 0.05  # of a plain token's time: what must be there for drafts to be thought of
LEAST_IDLE_TOKENS = 4
LEAST_GAP_TOKENS = 16  # between two probes
MOST_GAP_TOKENS = 1024
START_S = 1.5e-4  # to prepare the drafts of an answer, until it is measured
RECENT_KEPT = 0.95  # of the last turns, at each new one
READING_SHARE = 0.5  # of what may be lost, for reading what a draft has not seen
LEAST_READING = 8  # tokens whose time tells how fast a draft reads
READING_TOKEN_SHARE = 0.25  # of a drafted token's time, until it is measured


@dataclass(frozen=True, slots=True)
class Offer:
    """What a turn may do: drafts at most, computed ones at most, tokens that a draft may read first.

    `tokens_per_s` is what the time is worth; `is_probe`: to learn whether drafts pay by now; `idle_tokens`: so many
    tokens are to be decoded before drafts are thought of again.
    """

    most: int = 0
    most_computed: int = 0
    reading_tokens: int = 0
    tokens_per_s: float = 0.0
    is_probe: bool = False
    idle_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A pass of the target over `verified` candidates of a proposal, and what it took; `accepted` were right."""

    proposal: Proposal
    verified: int
    accepted: int
    draft_s: float
    verify_s: float
    exchange_s: float = 0.0
    is_probe: bool = False

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.draft_s + self.verify_s + self.exchange_s


class Policy:
    """Chooses depths of up to `most` drafts; see the module.

    `times` and `draft_s` (seconds of a computed draft) begin as expected, as does `acceptance` (a chance a position).
    """

    def __init__(
        self, times: PassTimes, *, draft_s: float, acceptance: float, most: int, is_forced: bool = False
    ) -> None:
        self.most = most
        self.is_forced = is_forced
        self.times = times
        self.acceptance = Acceptance(acceptance, most)
        self.calibration = Calibration()
        self._draft_s = RunningMean(draft_s)
        self._read_s = RunningMean(draft_s * READING_TOKEN_SHARE)
        self._exchange_s = RunningMean(0.0)
        self._start_s = RunningMean(START_S)
        self._advance_s = 0.0
        self._recent_tokens, self._recent_s = 0.0, 0.0
        self._since_plain = 0
        self._since_drafts = 0
        self._gap = LEAST_GAP_TOKENS

    def costs(self) -> Costs:
        """What things take by now."""
        return Costs(self._draft_s.value, self._exchange_s.value, self.times.seconds, self.times.seconds(1))

    def plain_tokens_before_start(self, account: Account, tokens: int) -> int:
        """How many more tokens to decode before an answer, that has `tokens` by now, can afford to begin drafting."""
        plain_s = self.times.seconds(1)
        account.advance_s = self._advance_s
        account.add_plain(tokens * plain_s)
        return 0 if self.is_forced else account.plain_tokens_until(self._start_s.value, plain_s)

    def started(self, account: Account, seconds: float) -> None:
        """Drafts of an answer were prepared."""
        self._start_s.add(seconds)
        account.add_plain(0.0, seconds)

    def offer(self, account: Account, room: int) -> Offer:
        """What the next turn may do, where at most `room` drafts can be of use."""
        room = min(room, self.most)
        if room < 1:
            return Offer()
        if self.is_forced:
            return Offer(room, room, 1 << 30, self.costs().plain_rate)
        if self.times.measurements(1) < FIRST_PLAIN or self._since_plain >= REFRESH_TOKENS:
            return Offer()
        costs = self.costs()
        depth = best_depth(self.acceptance.chances(room), costs)
        is_probe = self._since_drafts >= self._gap
        credit = account.credit_s(costs.plain_s)
        least_s = max(costs.turn_s(1) - costs.plain_s, LEAST_CREDIT * costs.plain_s)
        if credit < least_s:
            idle = account.plain_tokens_until(least_s, costs.plain_s)
            return Offer(idle_tokens=min(max(idle, LEAST_IDLE_TOKENS), MOST_GAP_TOKENS))
        kept = 0.0 if account.turns else READING_SHARE
        computed = self._affordable(costs, credit * (1 - kept), room, costs.draft_s)
        if not depth.drafts:
            computed = min(computed, PROBE_DRAFTS) if is_probe else 0
        reading = int(max(credit, 0.0) * READING_SHARE / max(self._read_s.value, 1e-9))
        free = self._affordable(costs, credit, room, 0.0)
        return Offer(free, min(computed, free), reading, self._tokens_per_s(costs), is_probe)

    def goes_on(self, offer: Offer) -> GoesOn:
        """Told of each candidate of one proposal: whether the chance that another one counts is worth its time."""
        costs, reach, drafted = self.costs(), 1.0, 0
        chances = self.acceptance.chances(self.most)

        def tell(source: str, confidence: float) -> bool:
            nonlocal reach, drafted
            drafted += 1
            if self.is_forced:
                return True
            reach *= self.calibration.chance(source, confidence)
            more_s = costs.draft_s + costs.verify_s(drafted + 2) - costs.verify_s(drafted + 1)
            return reach * chances[min(drafted, self.most - 1)] > offer.tokens_per_s * more_s

        return tell

    def worth_verifying(self, offer: Offer, proposal: Proposal) -> int:
        """How many of the candidates to verify, from the first on."""
        count = min(len(proposal.candidates), offer.most)
        if self.is_forced or not count:
            return count
        chances = [
            self.calibration.chance(proposal.source, candidate.confidence) for candidate in proposal.candidates[:count]
        ]
        worth = worth_verifying(chances, self.costs(), offer.tokens_per_s)
        return max(worth, min(count, PROBE_DRAFTS)) if offer.is_probe else worth

    def ended(self, account: Account) -> None:
        """An answer is over: what it gained, or lost, is the next one's advance."""
        self._advance_s = max(0.0, self._advance_s + account.gain_s)

    def idled(self, tokens: int, account: Account) -> None:
        """So many tokens were decoded without a thought of drafts."""
        account.add_plain(tokens * self.times.seconds(1))
        self._since_drafts += tokens
        self._since_plain = REFRESH_TOKENS

    def record(self, turn: Turn, account: Account) -> None:
        """Learn from a turn, and count it."""
        proposal, plain_s = turn.proposal, self.times.seconds(1)
        if proposal.is_computed and proposal.candidates:
            self._draft_s.add(max(turn.draft_s - proposal.read_s, 0.0) / len(proposal.candidates))
        if proposal.read_tokens >= LEAST_READING:
            self._read_s.add(proposal.read_s / proposal.read_tokens)
        self.times.add(turn.verified + 1, turn.verify_s)
        self._recent_tokens = RECENT_KEPT * self._recent_tokens + turn.accepted + 1
        self._recent_s = RECENT_KEPT * self._recent_s + turn.seconds
        if not turn.verified:
            account.add_plain(turn.verify_s, turn.draft_s + turn.exchange_s)
            self._since_plain = 0
            self._since_drafts += 1
            return
        self._exchange_s.add(turn.exchange_s)
        self._learn(proposal, turn.verified, turn.accepted)
        account.add(turn.accepted + 1, turn.seconds, plain_s)
        self._since_plain += turn.accepted + 1
        self._since_drafts = 0
        pays = (turn.accepted + 1) * plain_s > turn.seconds
        if pays:
            self._gap = LEAST_GAP_TOKENS
        elif turn.is_probe:
            self._gap = min(2 * self._gap, MOST_GAP_TOKENS)

    def _learn(self, proposal: Proposal, verified: int, accepted: int) -> None:
        if proposal.is_computed:
            self.acceptance.add(verified, accepted)
        tested: Sequence[Candidate] = proposal.candidates[: min(verified, accepted + 1)]
        for position, candidate in enumerate(tested):
            self.calibration.add(proposal.source, candidate.confidence, right=position < accepted)

    def _tokens_per_s(self, costs: Costs) -> float:
        """What time is worth: the speed of the last turns, or that without drafts where it is higher."""
        recent = self._recent_tokens / self._recent_s if self._recent_s else 0.0
        return max(recent, costs.plain_rate)

    @staticmethod
    def _affordable(costs: Costs, credit_s: float, room: int, draft_s: float) -> int:
        """The most drafts whose worst case, one token for all the time, `credit_s` covers."""
        for drafts in range(room, 0, -1):
            if drafts * draft_s + costs.exchange_s + costs.verify_s(drafts + 1) - costs.plain_s <= credit_s:
                return drafts
        return 0
