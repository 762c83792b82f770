"""What a user asks of drafts: which source, how many tokens at most, and how answers are kept the target's own.

Knows nothing of files' contents.
"""

from dataclasses import dataclass

from planner.drafts import MOST_DRAFTS
from runtime.sampler import check_integer, check_number

OFF = "off"
AUTO = "auto"
NGRAM = "ngram"
DEFAULT_MOST = 8
DEFAULT_TREE = 32
MOST_TREE = 48


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """Checked when made; RequestError for a value out of bounds.

    `source` is "off", "auto", "ngram", a GGUF file, or such a file and "ngram" joined by a comma. `synthetic` makes
    drafts right with that chance, at the cost of `source`. `rejection` keeps the distribution of answers but not the
    text of a seed. `forced` verifies every draft, whether it pays or not. `tree`: drafts of a tree at most, where one
    pays; 0 for chains alone.
    """

    source: str = OFF
    most: int = DEFAULT_MOST
    synthetic: float | None = None
    rejection: bool = False
    forced: bool = False
    tree: int = DEFAULT_TREE

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_integer("--draft-max", self.most, 1, MOST_DRAFTS)
        check_integer("--draft-tree", self.tree, 0, MOST_TREE)
        if self.synthetic is not None:
            check_number("--spec-synthetic", self.synthetic, 0.0, 1.0)

    @property
    def is_on(self) -> bool:
        """Whether any drafts are wanted."""
        return self.source != OFF or self.synthetic is not None

    @property
    def words(self) -> tuple[str, ...]:
        """The parts of `source` that have a meaning of their own."""
        return tuple(part for part in self.source.split(",") if part in (OFF, AUTO, NGRAM))

    @property
    def files(self) -> tuple[str, ...]:
        """The other parts of `source`."""
        return tuple(part for part in self.source.split(",") if part not in (OFF, AUTO, NGRAM))
