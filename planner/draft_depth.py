"""How many tokens to draft, in a chain or a tree: the cost model of speculative decoding, of chances and seconds.

A chain of g drafts whose i-th is right with chance a_i, if those before it are, yields 1 + a_1 + a_1 a_2 + ... tokens
in g t_d + t_x + t_v(g + 1) seconds; with one chance a for all, (1 - a^(g+1)) / (1 - a) tokens (Leviathan et al., 2023).
A tree of n drafts yields 1 + the chances that they are reached, each that of its parent times its own; the best n are
those of the greatest chances (Svirschevski et al., "SpecExec", 2024).
Knows nothing of where the figures come from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: of a drafted token, of what a turn costs besides, of a target's pass over n tokens, of a plain token."""

    draft_s: float
    exchange_s: float
    verify_s: Callable[[int], float]
    plain_s: float

    def turn_s(self, drafted: int) -> float:
        """Of drafting and verifying that many tokens."""
        return drafted * self.draft_s + self.exchange_s + self.verify_s(drafted + 1)

    @property
    def plain_rate(self) -> float:
        """Tokens a second without drafts."""
        return 1.0 / self.plain_s


@dataclass(frozen=True, slots=True)
class Depth:
    """Tokens to draft, and the tokens a second that they promise; 0 drafts are plain decoding."""

    drafts: int
    tokens_per_s: float


def expected_tokens(chances: Sequence[float]) -> float:
    """Tokens that a pass over such drafts yields on average, the target's own included."""
    total, reach = 1.0, 1.0
    for chance in chances:
        reach *= chance
        total += reach
    return total


def best_depth(chances: Sequence[float], costs: Costs) -> Depth:
    """The number of drafts, at most as many as there are chances, with the highest rate."""
    best = Depth(0, costs.plain_rate)
    total, reach = 1.0, 1.0
    for drafts, chance in enumerate(chances, 1):
        reach *= chance
        total += reach
        rate = total / costs.turn_s(drafts)
        if rate > best.tokens_per_s:
            best = Depth(drafts, rate)
    return best


def best_tree(chances: Sequence[float], others: Sequence[float], costs: Costs, most: int) -> Depth:
    """The number of drafts of a tree, at most `most`, with the highest rate.

    `chances`: of a source's first choice, by depth; `others`: of its next ones, where those before are wrong.
    A step of the source gives all choices behind a token.
    """
    best, total = Depth(0, costs.plain_rate), 1.0
    waiting: list[tuple[float, int, int]] = []  # less what it is reached with, its parent's number, its depth

    def grow(number: int, depth: int, reach: float) -> None:
        if depth < len(chances):
            left = reach
            for chance in (chances[depth], *others):
                heappush(waiting, (-left * chance, number, depth + 1))
                left *= 1.0 - chance

    grow(0, 0, 1.0)
    parents: set[int] = set()
    for number in range(1, most + 1):
        if not waiting:
            break
        less, parent, depth = heappop(waiting)
        parents.add(parent)
        total -= less
        rate = total / (len(parents) * costs.draft_s + costs.exchange_s + costs.verify_s(number + 1))
        if rate > best.tokens_per_s:
            best = Depth(number, rate)
        grow(number, depth, -less)
    return best


def worth_verifying(reaches: Sequence[float], costs: Costs, tokens_per_s: float) -> int:
    """How many of some drafts, that are there already, to verify where time yields that many tokens a second.

    `reaches`: the chance that each counts; in a tree, parents before children.
    """
    best, most, total = 0, 1.0 - tokens_per_s * costs.plain_s, 1.0
    for drafts, reach in enumerate(reaches, 1):
        total += reach
        surplus = total - tokens_per_s * (costs.exchange_s + costs.verify_s(drafts + 1))
        if surplus > most:
            best, most = drafts, surplus
    return best
