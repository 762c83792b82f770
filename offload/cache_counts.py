"""What a cache of streamed weights has seen: lookups, misses, bytes. Knows nothing about how it works."""

from dataclasses import dataclass
from typing import Any

from offload.prefetch_gate import Trial


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What the cache has seen since it was made."""

    lookups: int = 0
    misses: int = 0
    read_ahead: int = 0  # experts
    bytes_read: int = 0
    waiting_s: float = 0.0  # while experts that a step waited for were on their way
    foreseen: int = 0  # experts read on a guess of what the next layer uses
    foreseen_used: int = 0  # of those, that the layer used; no misses
    wasted_bytes: int = 0  # read for the others
    trial: Trial | None = None  # the newest of reading on a guess against not doing it

    @property
    def hit_rate(self) -> float:
        """Lookups that found their expert, or found it on its way, those not counted that only a guess brought."""
        return 1.0 - (self.misses + self.foreseen_used) / self.lookups if self.lookups else 0.0

    @property
    def foreseen_recall(self) -> float:
        """Of the experts that were lacking, the part that a guess brought or had begun to bring."""
        lacking = self.misses + self.foreseen_used
        return self.foreseen_used / lacking if lacking else 0.0

    def since(self, before: "CacheCounts") -> "CacheCounts":
        """What came after."""
        return CacheCounts(
            self.lookups - before.lookups,
            self.misses - before.misses,
            self.read_ahead - before.read_ahead,
            self.bytes_read - before.bytes_read,
            self.waiting_s - before.waiting_s,
            self.foreseen - before.foreseen,
            self.foreseen_used - before.foreseen_used,
            self.wasted_bytes - before.wasted_bytes,
            self.trial,
        )

    def as_dict(self) -> dict[str, Any]:
        """The counts and rates as JSON types, seconds of a token with and without guesses from the newest trial."""
        trial = self.trial
        return {
            "stream_hit_rate": self.hit_rate,
            "stream_bytes_read": self.bytes_read,
            "stream_waiting_s": self.waiting_s,
            "prefetch_experts": self.foreseen,
            "prefetch_recall": self.foreseen_recall,
            "prefetch_wasted_bytes": self.wasted_bytes,
            "prefetch_token_s": trial.open_s if trial else None,
            "no_prefetch_token_s": trial.closed_s if trial else None,
            "prefetch_is_faster": trial.is_won if trial else None,
        }
