"""What drafts did over a run: counts, seconds and the speed they gave, for people and for JSON.

Knows nothing of how drafts are made or judged.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from runtime.speculative.turn import Turn
from runtime.trace import Trace

log = logging.getLogger("strata.speculative")


@dataclass(slots=True)
class Totals:
    """Sums over the turns of one answer or of several.

    `reached[i]` drafts at position i were put to the test, `accepted[i]` of them were right; `plain_token_s` is what a
    token took without drafts, `plain_token_s_of` where so many sequences were answered at once. `trees`: passes with a
    tree; `tree_right`: their drafts that were right, by rank among a source's choices.
    """

    draft: str
    tokens: int = 0
    passes: int = 0
    plain_passes: int = 0
    drafted: int = 0
    verified: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    exchange_s: float = 0.0
    plain_s: float = 0.0
    plain_token_s: float = 0.0
    plain_token_s_of: dict[int, float] = field(default_factory=dict)
    tokens_of: Counter[int] = field(default_factory=Counter)
    trees: int = 0
    tree_drafts: int = 0
    tree_right: Counter[int] = field(default_factory=Counter)
    together: str | None = None  # why there were none for several sequences at once
    failure: str | None = None
    trace: Trace | None = None

    def add(self, turn: Turn, lanes: int = 1) -> None:
        """Count a turn of one of so many sequences."""
        self.tokens += turn.accepted + 1
        self.tokens_of[lanes] += turn.accepted + 1
        self.drafted += len(turn.proposal.candidates)
        self.draft_s += turn.draft_s
        self.exchange_s += turn.exchange_s
        if not turn.verified:
            self.plain_passes += 1
            self.plain_s += turn.verify_s
            return
        self.passes += 1
        self.verified += turn.verified
        self.verify_s += turn.verify_s
        for position in range(turn.tested):
            if position == len(self.reached):
                self.reached.append(0)
                self.accepted.append(0)
            self.reached[position] += 1
            self.accepted[position] += position < turn.accepted
        if turn.proposal.parents is not None:
            self.trees += 1
            self.tree_drafts += turn.verified
            self.tree_right.update(turn.proposal.candidates[place].rank for place in turn.right)

    def add_idle(self, tokens: int, lanes: int = 1) -> None:
        """Count tokens that were decoded elsewhere, while drafts were off, so many sequences at once."""
        self.tokens += tokens
        self.tokens_of[lanes] += tokens
        self.plain_passes += tokens
        self.plain_s += tokens * self.plain_token_s_of.get(lanes, 0.0)

    def plain_took(self, token_s: float, lanes: int = 1) -> None:
        """A token takes that long by now without drafts, so many sequences at once."""
        self.plain_token_s_of[lanes] = token_s
        self.plain_token_s = self._plain_s() / self.tokens if self.tokens else token_s

    def _plain_s(self) -> float:
        """Seconds that all tokens would have taken without drafts."""
        return sum(count * self.plain_token_s_of.get(lanes, 0.0) for lanes, count in self.tokens_of.items())

    def took(self, name: str, start_s: float, end_s: float, **numbers: float) -> None:
        """Shows in the trace, if there is one: drafting, verifying or the exchange between them."""
        if self.trace is not None and end_s > start_s:
            self.trace.add(name, name, start_s, end_s, **numbers)

    def fail(self, error: Exception) -> None:
        """The draft failed: answers go on without."""
        self.failure = f"{type(error).__name__}: {error}"
        log.warning("the draft failed; answers go on without: %s", self.failure)

    @property
    def seconds(self) -> float:
        """Of decoding, without what is done with its tokens."""
        return self.draft_s + self.verify_s + self.exchange_s + self.plain_s

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafts put to the test that were right."""
        return sum(self.accepted) / sum(self.reached) if sum(self.reached) else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens of a pass of the target, plain ones included."""
        passes = self.passes + self.plain_passes
        return self.tokens / passes if passes else None

    @property
    def gain(self) -> float | None:
        """Speed over that of plain decoding, as its tokens were measured in between."""
        return self._plain_s() / self.seconds if self.seconds and self.plain_token_s else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: rates and seconds under the names of the fields."""
        return {
            "draft": self.draft,
            "tokens": self.tokens,
            "passes": self.passes,
            "plain_passes": self.plain_passes,
            "drafted": self.drafted,
            "verified": self.verified,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_by_position": self.by_position(),
            "tokens_per_pass": self.tokens_per_pass,
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
            "exchange_s": self.exchange_s,
            "plain_s": self.plain_s,
            "plain_token_s": self.plain_token_s,
            "gain": self.gain,
            "trees": self.trees,
            "tree_drafts": self.tree_drafts,
            "tree_right_by_rank": [self.tree_right[rank] for rank in range(max(self.tree_right, default=-1) + 1)],
            "together": self.together,
            "failure": self.failure,
        }

    def by_position(self) -> list[float]:
        """Acceptance of each position, of the drafts that reached it."""
        return [right / seen for right, seen in zip(self.accepted, self.reached, strict=True) if seen]

    def summary(self) -> str:
        """One line for the end of a run."""
        if self.failure is not None:
            return f"drafts ({self.draft}) failed and were left out: {self.failure}"
        gain = self.gain
        if not self.tokens and self.together is not None:
            return f"drafts ({self.draft}) were off: {self.together}"
        if not self.tokens or gain is None:
            return f"drafts ({self.draft}) were off: the answer was too short to pay for their start"
        if not self.passes:
            return f"drafts ({self.draft}) were off: none was worth its time"
        rate = self.acceptance_rate or 0.0
        text = (
            f"drafts ({self.draft}): {gain:.2f}x the speed of plain decoding, {rate:.0%} accepted, "
            f"{self.tokens_per_pass:.2f} tokens a pass"
        )
        plain = self.plain_passes / (self.passes + self.plain_passes)
        return f"{text}; off for {plain:.0%} of the passes" if plain > 0.5 else text

    def _tree_lines(self) -> list[str]:
        """Of trees, where there were some; of sequences at once, where drafts were off for them."""
        lines = [] if self.together is None else [f"several sequences at once: {self.together}"]
        if self.trees:
            others = sum(count for rank, count in self.tree_right.items() if rank)
            size, right = self.tree_drafts / self.trees, self.tree_right.total()
            lines.append(f"{self.trees} trees of {size:.1f} drafts: {right} accepted, {others} of them no first choice")
        return lines

    def lines(self) -> list[str]:
        """The figures behind the summary."""
        positions = " ".join(f"{rate:.0%}" for rate in self.by_position()) or "none was put to the test"
        return [
            f"accepted by position: {positions}",
            *self._tree_lines(),
            f"{self.tokens} tokens in {self.passes} passes with drafts and {self.plain_passes} without; "
            f"{self.drafted} drafted, {self.verified} verified, {sum(self.accepted)} accepted",
            f"drafting {self.draft_s:.3f} s, verifying {self.verify_s:.3f} s, exchange {self.exchange_s:.3f} s, "
            f"plain passes {self.plain_s:.3f} s",
        ]
