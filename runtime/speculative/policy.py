"""When to draft and how much: the cost model fed with live measurements, within what an answer's account allows.

One policy serves all sequences of an engine that are answered alone, so that an answer begins with what earlier ones
taught; one `for_lanes` those that are answered together, whose turns it counts in tokens of each. Knows nothing of
tokens' meaning; reads no clock. Whether drafts pay is told by passes with them and plain ones made in turn
(`runtime.speculative.pass_times`): at first, and again after so many tokens that the plain ones cost `COMPARED_SHARE`
of what drafts gain. Invariants: with `is_forced` every draft is verified; without, a turn whose worst case the account
does not cover is not begun, and one that is not expected to pay is begun only as a probe.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from planner.draft_depth import Costs, Depth, best_depth, best_tree, worth_verifying
from runtime.speculative.account import Account
from runtime.speculative.draft import Candidate, ChooseSeveral, GoesOn, Proposal, TreeGuide
from runtime.speculative.estimates import Acceptance, Calibration, Ranks
from runtime.speculative.pass_times import PassTimes, RecentMedian
from runtime.speculative.turn import Offer, Turn

COMPARED_PLAIN = 3  # plain passes of a comparison, in turn with drafted ones
COMPARED_SHARE = 0.01  # of the time, for plain passes that drafted ones are compared with
LEAST_COMPARED_TOKENS = 64  # from one comparison to the next
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
OTHERS = (0.45, 0.3)  # chances of a source's second and third choice where those before are wrong, until measured
TREE_TURNS = 16  # after which it is thought over again whether a tree pays
TREE_ADVANTAGE = 1.02  # of a tree's expected speed over a chain's, for it to be taken


class Policy:
    """Chooses depths of up to `most` drafts; see the module.

    `times` and `draft_s` (seconds of a computed draft) begin as expected, as does `acceptance` (a chance a position).
    A tree has up to `most_tree` drafts.
    """

    def __init__(
        self,
        times: PassTimes,
        *,
        draft_s: float,
        acceptance: float,
        most: int,
        most_tree: int = 0,
        is_forced: bool = False,
    ) -> None:
        self.most = most
        self.most_tree = most_tree
        self.lanes = 1
        self.is_forced = is_forced
        self.times = times
        self.acceptance = Acceptance(acceptance, most)
        self.ranks = Ranks(OTHERS)
        self.calibration = Calibration()
        self._draft_s = RecentMedian(draft_s)
        self._read_s = RecentMedian(draft_s * READING_TOKEN_SHARE)
        self._exchange_s = RecentMedian(0.0)
        self._start_s = RecentMedian(START_S)
        self._advance_s = 0.0
        self._recent_tokens, self._recent_passes = 0.0, 0.0
        self._wanted_plain = COMPARED_PLAIN
        self._is_plains_turn = True
        self._since_compared = 0.0
        self._since_drafts = 0
        self._gap = LEAST_GAP_TOKENS
        self._tree = Depth(0, 0.0)
        self._since_tree = TREE_TURNS

    def for_lanes(self, lanes: int) -> "Policy":
        """One for so many sequences at once; what drafts are like is known to both, what passes take is not."""
        other = copy(self)
        other.lanes, other.most_tree = lanes, 0
        other.times = PassTimes(self.times.seconds, lanes)
        other._recent_tokens = other._recent_passes = other._since_compared = 0.0
        other._wanted_plain, other._is_plains_turn, other._since_drafts = COMPARED_PLAIN, True, 0
        other._gap = LEAST_GAP_TOKENS
        return other

    def costs(self) -> Costs:
        """What things take by now, where every sequence does the same."""
        lanes, seconds = self.lanes, self.times.seconds
        verify_s = seconds if lanes == 1 else (lambda tokens: seconds(lanes * tokens))
        return Costs(lanes * self._draft_s.value, self._exchange_s.value, verify_s, self.plain_s)

    @property
    def plain_s(self) -> float:
        """Seconds of a pass without drafts."""
        return self.times.plain_s

    def plain_tokens_before_start(self, account: Account, tokens: int) -> int:
        """How many more tokens to decode before an answer, that has `tokens` by now, can afford to begin drafting."""
        plain_s = self.plain_s
        account.advance_s = self._advance_s
        account.add_plain(tokens * plain_s)
        return 0 if self.is_forced else account.plain_tokens_until(self._start_s.value, plain_s)

    def started(self, account: Account, seconds: float) -> None:
        """Drafts of an answer were prepared."""
        self._start_s.add(seconds)
        account.add_plain(0.0, seconds)

    def offer(self, account: Account, room: int, tree_room: int = 0) -> Offer:
        """What the next turn may do, where `room` drafts behind each other can be of use, or a tree of `tree_room`."""
        room, tree_room = min(room, self.most), min(tree_room, self.most_tree)
        if room < 1:
            return Offer()
        if self.is_forced:
            return Offer(room, room, 1 << 30, self.costs().plain_rate, tree=tree_room)
        if self._wanted_plain and self._is_plains_turn:
            return Offer()
        costs = self.costs()
        depth = best_depth(self.acceptance.chances(room), costs)
        wants_tree = self._tree_pays(depth, costs, room, tree_room)
        is_probe = self._since_drafts >= self._gap
        credit = account.credit_s(costs.plain_s)
        least_s = max(costs.turn_s(1) - costs.plain_s, LEAST_CREDIT * costs.plain_s)
        if credit < least_s:
            idle = account.plain_tokens_until(least_s, costs.plain_s)
            return Offer(idle_tokens=min(max(idle, LEAST_IDLE_TOKENS), MOST_GAP_TOKENS))
        kept = 0.0 if account.turns else READING_SHARE
        computed = self._affordable(costs, credit * (1 - kept), room, costs.draft_s)
        if not depth.drafts and not wants_tree:
            computed = min(computed, PROBE_DRAFTS) if is_probe else 0
        reading = int(max(credit, 0.0) * READING_SHARE / max(self._read_s.value, 1e-9))
        free = self._affordable(costs, credit, room, 0.0)
        tree = self._affordable(costs, credit * (1 - kept), tree_room, costs.draft_s) if wants_tree else 0
        offer = Offer(free, min(computed, free), reading, self._tokens_per_s(costs), is_probe)
        return replace(offer, tree=tree) if tree > 1 else offer

    def tree_guide(self, offer: Offer, choose: ChooseSeveral) -> TreeGuide | None:
        """How the tree of an offer is grown; None where it wants a chain."""
        if not offer.tree:
            return None
        costs, rate = self.costs(), offer.tokens_per_s
        first = self.acceptance.chances(1)[0]

        def worth_a_place(reach: float, drafted: int) -> bool:
            more_s = costs.verify_s(drafted + 2) - costs.verify_s(drafted + 1)
            return self.is_forced or reach > rate * more_s

        def worth_a_step(reach: float, drafted: int) -> bool:
            return worth_a_place(reach * first - rate * costs.draft_s, drafted)

        return TreeGuide(offer.tree, offer.most, choose, self._chance, worth_a_place, worth_a_step)

    def goes_on(self, offer: Offer) -> GoesOn:
        """Told of each candidate of one proposal: whether the chance that another one counts is worth its time."""
        costs, reach, drafted = self.costs(), 1.0, 0
        chances = self.acceptance.chances(self.most)

        def tell(source: str, confidence: float) -> bool:
            nonlocal reach, drafted
            drafted += 1
            if self.is_forced:
                return True
            reach *= self.calibration.chance((source, 0), confidence)
            more_s = costs.draft_s + costs.verify_s(drafted + 2) - costs.verify_s(drafted + 1)
            return reach * chances[min(drafted, self.most - 1)] > offer.tokens_per_s * more_s

        return tell

    def worth_verifying(self, offer: Offer, proposal: Proposal) -> int:
        """How many of the candidates to verify, from the first on."""
        count = min(len(proposal.candidates), offer.most if proposal.parents is None else offer.tree)
        if self.is_forced or not count:
            return count
        reaches: list[float] = []
        for place, candidate in enumerate(proposal.candidates[:count]):
            parent = proposal.parent(place)
            reach = self._chance(proposal.source, candidate)
            reaches.append(reach if parent < 0 else reach * reaches[parent])
        worth = worth_verifying(reaches, self.costs(), offer.tokens_per_s)
        return max(worth, min(count, PROBE_DRAFTS)) if offer.is_probe else worth

    def ended(self, account: Account) -> None:
        """An answer is over: what it gained, or lost, is the next one's advance."""
        self._advance_s = max(0.0, self._advance_s + account.gain_s)

    def idled(self, tokens: int, account: Account) -> None:
        """So many tokens were decoded without a thought of drafts."""
        account.add_plain(tokens * self.plain_s)
        self._since_drafts += tokens

    def passed_plainly(self, seconds: float) -> None:
        """A pass without drafts was made."""
        self.times.add(self.lanes, seconds)
        self._wanted_plain = max(self._wanted_plain - 1, 0)
        self._is_plains_turn = False

    def record(self, turns: Sequence[Turn], account: Account) -> None:
        """Learn from the turns of one pass, a sequence each, and count them."""
        plain_s, lanes = self.plain_s, len(turns)
        seconds, verify_s = sum(turn.seconds for turn in turns), sum(turn.verify_s for turn in turns)
        tokens = sum(turn.accepted + 1 for turn in turns) / lanes
        for turn in turns:
            self._learn(turn)
        self._recent_tokens = RECENT_KEPT * self._recent_tokens + tokens
        self._recent_passes = RECENT_KEPT * self._recent_passes + seconds / plain_s
        self._since_tree += 1
        if not any(turn.verified for turn in turns):
            account.add_plain(verify_s, seconds - verify_s)
            self.passed_plainly(verify_s)
            self._since_drafts += 1
            return
        account.add(tokens, seconds, plain_s)
        self.times.add(sum(turn.verified + turn.before for turn in turns), verify_s)
        self._exchange_s.add(sum(turn.exchange_s for turn in turns))
        self._compare_later(tokens)
        self._since_drafts = 0
        if tokens * plain_s > seconds:
            self._gap = LEAST_GAP_TOKENS
        elif turns[0].is_probe:
            self._gap = min(2 * self._gap, MOST_GAP_TOKENS)

    def _compare_later(self, tokens: float) -> None:
        """After a pass with drafts that gave so many tokens: plain ones are due in turn with more of them, or later."""
        self._is_plains_turn = True
        self._since_compared += tokens
        lost_tokens = COMPARED_PLAIN * (self._recent_gain - 1.0)
        if self._since_compared >= max(LEAST_COMPARED_TOKENS, lost_tokens / COMPARED_SHARE):
            self._since_compared, self._wanted_plain = 0.0, COMPARED_PLAIN

    @property
    def _recent_gain(self) -> float:
        """Tokens of the last turns for the time of a plain pass."""
        return self._recent_tokens / self._recent_passes if self._recent_passes else 1.0

    def _learn(self, turn: Turn) -> None:
        """From a turn's times, and from the candidates that were put to the test."""
        proposal, right = turn.proposal, set(turn.right)
        if proposal.computed:
            self._draft_s.add(max(turn.draft_s - proposal.read_s, 0.0) / proposal.computed)
        if proposal.read_tokens >= LEAST_READING:
            self._read_s.add(proposal.read_s / proposal.read_tokens)
        depth_of = {-1: 0} | {place: depth for depth, place in enumerate(turn.right, 1)}
        found = [False] * len(depth_of)
        for place, candidate in enumerate(proposal.candidates[: turn.verified]):
            depth = depth_of.get(proposal.parent(place))
            if depth is None:
                continue
            is_right = place in right
            self.calibration.add((proposal.source, candidate.rank), candidate.confidence, right=is_right)
            if proposal.is_computed and candidate.rank == 0:
                self.acceptance.add(depth, right=is_right)
            elif proposal.is_computed and not found[depth]:
                self.ranks.add(candidate.rank, right=is_right)
            found[depth] = found[depth] or is_right

    def _chance(self, source: str, candidate: Candidate) -> float:
        """That a candidate is right if those before it are."""
        return self.calibration.chance((source, candidate.rank), candidate.confidence)

    def _tree_pays(self, chain: Depth, costs: Costs, room: int, tree_room: int) -> bool:
        """Whether a tree promises more than the best chain, and than plain decoding."""
        if tree_room < 2:
            return False
        if self._since_tree >= TREE_TURNS:
            self._since_tree = 0
            self._tree = best_tree(self.acceptance.chances(room), self.ranks.chances(), costs, tree_room)
        return self._tree.drafts > 1 and self._tree.tokens_per_s > TREE_ADVANTAGE * chain.tokens_per_s

    def _tokens_per_s(self, costs: Costs) -> float:
        """What time is worth: the speed of the last turns, or that without drafts where it is higher."""
        return max(self._recent_gain, 1.0) * costs.plain_rate

    @staticmethod
    def _affordable(costs: Costs, credit_s: float, room: int, draft_s: float) -> int:
        """The most drafts whose worst case, one token for all the time, `credit_s` covers."""
        for drafts in range(room, 0, -1):
            if drafts * draft_s + costs.exchange_s + costs.verify_s(drafts + 1) - costs.plain_s <= credit_s:
                return drafts
        return 0
