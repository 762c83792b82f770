"""The draft that a plan chose beside a model: source, device and depth, what it takes, and the speed it promises.

A value, as all of a plan. Knows nothing about how it was chosen or how drafts are made.
"""

from dataclasses import dataclass
from enum import StrEnum

from planner.budget import format_size
from planner.figures import duration, figures


class DraftKind(StrEnum):
    """What proposes tokens: a second model, a head on the target's hidden states, lookup in the text, or nothing."""

    MODEL = "model"
    HEAD = "head"
    LOOKUP = "lookup"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class LearnedAcceptance:
    """How often a draft was right for a target in earlier runs; `runs` of them."""

    rate: float
    runs: int


@dataclass(frozen=True, slots=True)
class PlannedDraft:
    """A source of drafts; bytes are what it takes beside the target, seconds what a drafted token costs.

    `acceptance` is expected of each draft if those before it are right: learned from earlier runs, given, or assumed.
    `plain_tokens_per_s` is the speed of the best plan without drafts, `tokens_per_s` that of this one. Depth 0: it is
    there to be tried, and not expected to pay. Of lookup nothing is foretold. Where there is none, the figures are
    those of the best that was declined, 0 tokens a second where nothing fits beside the model.
    """

    kind: DraftKind
    name: str
    path: str | None
    looks_up: bool  # lookup goes before it
    device: str  # as a plan's settings name it
    depth: int
    acceptance: float
    acceptance_source: str
    draft_s: float
    context_tokens: int
    ram_bytes: int
    gpu_bytes: int
    plain_tokens_per_s: float
    tokens_per_s: float

    @property
    def gain(self) -> float:
        """Speed over that of the best plan without drafts."""
        return self.tokens_per_s / self.plain_tokens_per_s

    @property
    def declined(self) -> str:
        """Why it is not loaded."""
        if not self.tokens_per_s:
            return f"{self.name} and the model do not fit together"
        expected = f"{self.acceptance:.2g} ({self.acceptance_source})"
        return f"{self.name} would give {self.gain:.2f}x at an acceptance of {expected}"

    def lines(self) -> list[str]:
        """One or two lines for people."""
        if self.kind is DraftKind.LOOKUP:
            return [f"{self.name}: takes nothing; pays where the text repeats itself"]
        if self.kind is DraftKind.NONE:
            return [f"none; {self.declined}"]
        where = "CPU" if self.device == "cpu" else "simulated GPU" if self.device.startswith("sim:") else "GPU"
        name = f"lookup and {self.name}" if self.looks_up else self.name
        expected = f"expected acceptance {self.acceptance:.2g} ({self.acceptance_source})"
        if self.depth:
            promise = (
                f"{name} on {where}, depth {self.depth}, {expected}: {self.gain:.2f}x, "
                f"{figures(self.tokens_per_s)} tokens/s instead of {figures(self.plain_tokens_per_s)}"
            )
        else:
            promise = f"{name} on {where}, to be tried: not expected to pay, {expected}"
        held = format_size(self.ram_bytes) + " of RAM"
        if self.gpu_bytes:
            held += f", {format_size(self.gpu_bytes)} of GPU memory"
        return [promise, f"takes {held}; {duration(self.draft_s)} a drafted token"]
