"""What drafts did over a run: counts, seconds and the speed they gave, for people and for JSON.

Knows nothing of how drafts are made or judged.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from runtime.speculative.policy import Turn

log = logging.getLogger("strata.speculative")


@dataclass(slots=True)
class Totals:
    """Sums over the turns of one answer or of several.

    `reached[i]` drafts at position i were put to the test, `accepted[i]` of them were right; `plain_token_s` is what a
    token took without drafts.
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
    failure: str | None = None

    def add(self, turn: Turn) -> None:
        """Count a turn."""
        self.tokens += turn.accepted + 1
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
        while len(self.reached) < turn.verified:
            self.reached.append(0)
            self.accepted.append(0)
        for position in range(min(turn.verified, turn.accepted + 1)):
            self.reached[position] += 1
            self.accepted[position] += position < turn.accepted

    def add_idle(self, tokens: int) -> None:
        """Count tokens that were decoded elsewhere, while drafts were off."""
        self.tokens += tokens
        self.plain_passes += tokens
        self.plain_s += tokens * self.plain_token_s

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
        return self.tokens * self.plain_token_s / self.seconds if self.seconds and self.plain_token_s else None

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

    def lines(self) -> list[str]:
        """The figures behind the summary."""
        positions = " ".join(f"{rate:.0%}" for rate in self.by_position()) or "none was put to the test"
        return [
            f"accepted by position: {positions}",
            f"{self.tokens} tokens in {self.passes} passes with drafts and {self.plain_passes} without; "
            f"{self.drafted} drafted, {self.verified} verified, {sum(self.accepted)} accepted",
            f"drafting {self.draft_s:.3f} s, verifying {self.verify_s:.3f} s, exchange {self.exchange_s:.3f} s, "
            f"plain passes {self.plain_s:.3f} s",
        ]
