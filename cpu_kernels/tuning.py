"""Which kernels multiply matrices of each quant type on a machine: the choices, as values.

Made by `tune`, followed by `formats.chosen_format`. Plain data that JSON can hold; brings no compiler. Choices change
logits: tables round activations in another way than dot products do, so that two choices agree within that noise, while
one choice gives the same bits for every number of threads and columns.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

TILES = (1, 2, 4, 8, 16)


class Family(StrEnum):
    """How weights are multiplied: by integer or float dot products, or by sums of four activations from tables."""

    DOT = "dot"
    TABLES = "tables"


@dataclass(frozen=True, slots=True)
class Choice:
    """How matrices of one quant type are packed and multiplied; `seconds` as measured for each of `TUNED_COLUMNS`.

    ValueError for a tile that no kernel has.
    """

    family: Family
    tile_columns: int
    seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.tile_columns not in TILES:
            raise ValueError(f"a tile of {self.tile_columns} columns")


@dataclass(frozen=True, slots=True)
class Tuning:
    """Choices by the names of quant types, for one ISA; types without one get the default."""

    isa: str
    choices: Mapping[str, Choice] = field(default_factory=dict)

    def of(self, names: Iterable[str]) -> "Tuning":
        """The choices for these types alone, without what was measured."""
        return Tuning(
            self.isa,
            {name: replace(self.choices[name], seconds=()) for name in sorted(names) if name in self.choices},
        )

    def updated(self, newer: "Tuning | None") -> "Tuning":
        """With the choices of `newer` in place of those it has; only the newer ones if they are for another ISA."""
        if newer is None:
            return self
        kept = self.choices if newer.isa == self.isa else {}
        return Tuning(newer.isa, {**kept, **newer.choices})
