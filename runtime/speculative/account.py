"""What drafting cost and brought in one answer, against plain decoding: the bound on what may be lost.

Knows nothing of how drafts are made. Invariant: a turn is allowed only while the worst it can cost is covered by what
was gained before, one token's time, and one per cent of the time that decoding took; where earlier answers gained, by
some of that too.
"""

from dataclasses import dataclass
from math import ceil

ALLOWED_TOKENS = 1.0
ALLOWED_SHARE = 0.01
UNSEEN_S = 1e-4  # of an answer that is spent on drafts and not measured
MOST_ADVANCE_TOKENS = 1.5  # of what earlier answers gained


@dataclass(slots=True)
class Account:
    """Seconds spent on decoding one answer, and those that drafts have saved (negative: lost).

    `advance_s`: what earlier answers gained.
    """

    elapsed_s: float = 0.0
    gain_s: float = 0.0
    advance_s: float = 0.0
    turns: int = 0

    def add(self, tokens: float, seconds: float, plain_s: float) -> None:
        """Count a turn that gave so many tokens, where one costs `plain_s` without drafts."""
        self.turns += 1
        self.elapsed_s += seconds
        self.gain_s += tokens * plain_s - seconds

    def add_plain(self, seconds: float, lost_s: float = 0.0) -> None:
        """Count a plain token, and what was spent in vain on drafting it."""
        self.elapsed_s += seconds + lost_s
        self.gain_s -= lost_s

    def credit_s(self, plain_s: float) -> float:
        """Seconds that the next turn may cost more than it brings."""
        advance_s = min(self.advance_s, MOST_ADVANCE_TOKENS * plain_s)
        return self.gain_s + advance_s + ALLOWED_TOKENS * plain_s + ALLOWED_SHARE * self.elapsed_s - UNSEEN_S

    def plain_tokens_until(self, credit_s: float, plain_s: float) -> int:
        """Tokens to decode without a thought of drafts before the credit is `credit_s`."""
        missing_s = credit_s - self.credit_s(plain_s)
        return max(0, ceil(missing_s / (ALLOWED_SHARE * plain_s)))
