"""Chooses, for each quant type, the kernel family and tile shape that is fastest on this machine.

A matrix lies in memory once, and its product must not depend on how many columns are multiplied together, so that a
choice holds for every number of columns. The default needs no measurement: dot products. Another candidate replaces it
only if it is no slower at one column, which decides how fast text is written, and at least 5% faster over all.
Knows nothing about models; who keeps a `Tuning` stores it as JSON.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from cpu_kernels import isa as ladder
from cpu_kernels.formats import Family, PanelFormat, has_panel_format, panel_format
from cpu_kernels.isa import ISA
from cpu_kernels.measure import Bench
from cpu_kernels.quant_types import QuantType

TUNED_COLUMNS = (1, 2, 4, 8, 16, 32, 128)
_TILES = (4, 8)
_SLOWER_ALONE = 1.02  # at one column: noise
_FASTER_OVERALL = 0.95

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Choice:
    """How matrices of one quant type are packed and multiplied; `seconds` for each of `TUNED_COLUMNS`."""

    family: Family
    tile_columns: int
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Tuning:
    """Choices by the names of quant types, for one ISA; types without one get the default."""

    isa: str
    choices: Mapping[str, Choice] = field(default_factory=lambda: MappingProxyType({}))

    def panel_format(self, quant_type: QuantType, isa: ISA) -> PanelFormat:
        """How to pack a matrix. NotImplementedError for a type without kernels, ValueError for another ISA."""
        if isa.name != self.isa:
            raise ValueError(f"kernels were tuned for {self.isa}, not for {isa.name}")
        choice = self.choices.get(quant_type.name)
        if choice is None:
            return panel_format(quant_type, isa)
        return panel_format(quant_type, isa, choice.family).with_tile(choice.tile_columns)

    def to_json(self) -> Json:
        """As dictionaries, lists, strings and numbers."""
        return {
            "isa": self.isa,
            "columns": list(TUNED_COLUMNS),
            "choices": {
                name: {
                    "family": choice.family.value,
                    "tile_columns": choice.tile_columns,
                    "seconds": list(choice.seconds),
                }
                for name, choice in self.choices.items()
            },
        }

    @classmethod
    def from_json(cls, data: object) -> "Tuning":
        """What `to_json` gave; ValueError for anything else."""
        match data:
            case {"isa": str(isa), "columns": list(columns), "choices": dict(choices)}:
                if columns != list(TUNED_COLUMNS):
                    raise ValueError(f"kernels were tuned for {columns} columns, not for {list(TUNED_COLUMNS)}")
                read = {str(name): _choice_from_json(name, choice) for name, choice in choices.items()}
                return cls(isa, MappingProxyType(read))
            case _:
                raise ValueError(f"not a tuning of kernels: {str(data)[:80]}")


def _choice_from_json(name: object, data: object) -> Choice:
    match data:
        case {"family": str(family), "tile_columns": int(tile), "seconds": list(seconds)}:
            if all(isinstance(second, int | float) for second in seconds):
                return Choice(Family(family), tile, tuple(float(second) for second in seconds))
    raise ValueError(f"not a choice of kernels for {name}: {str(data)[:80]}")


def default_tuning(isa: ISA | None = None) -> Tuning:
    """Dot products for every type, nothing measured."""
    return Tuning((isa or ladder.current()).name)


def tune(
    quant_types: Iterable[QuantType], *, threads: int = 1, seconds_budget: float = 0.8, isa: ISA | None = None
) -> Tuning:
    """Measures every family and tile shape of the types that have more than one.

    About `seconds_budget` are spent measuring, five runs of each at least (20 ms a candidate); compiling what is not
    cached, some 0.1 s a kernel, comes on top. NotImplementedError where the system has no clock for it.
    """
    used = isa or ladder.current()
    candidates = {kind.name: _candidates(kind, used) for kind in quant_types if has_panel_format(kind)}
    count = sum(len(forms) for forms in candidates.values())
    choices: dict[str, Choice] = {}
    if count:
        share = seconds_budget / (count * len(TUNED_COLUMNS))
        with Bench(threads) as bench:
            for name, forms in candidates.items():
                seconds = [tuple(bench.time(form, n, share).product for n in TUNED_COLUMNS) for form in forms]
                best = fastest(seconds)
                choices[name] = Choice(forms[best].family, forms[best].isa.tile_columns, seconds[best])
    return Tuning(used.name, MappingProxyType(choices))


def _candidates(quant_type: QuantType, isa: ISA) -> list[PanelFormat]:
    """The default first."""
    result: list[PanelFormat] = []
    for family in Family:
        if has_panel_format(quant_type, family):
            form = panel_format(quant_type, isa, family)
            tiles = [form.isa.tile_columns, *(tile for tile in _TILES if tile != form.isa.tile_columns)]
            result += [form.with_tile(tile) for tile in (tiles if family is Family.DOT else tiles[:1])]
    return result


def fastest(seconds: Sequence[Sequence[float]]) -> int:
    """Which candidate to take; `seconds` of each at one column first, those of the default before the others."""
    best, best_ratio = 0, _FASTER_OVERALL
    for index, times in enumerate(seconds):
        ratios = [mine / default for mine, default in zip(times, seconds[0], strict=True)]
        overall = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if ratios[0] <= _SLOWER_ALONE and overall < best_ratio:
            best, best_ratio = index, overall
    return best
