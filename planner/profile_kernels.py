"""Which of this machine's kernels multiply matrices of a quant type, and how fast, at several columns and threads.

Measured in a process of its own, so that neither its memory nor the compiler it imports counts as the caller's. Knows
nothing about profiles and where they are kept.
Invariant: rates are those of the kernels that the tuning beside them chooses.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cpu_kernels.tuning import Tuning
from planner.apart import FAILURES, measured_apart
from planner.machine import KernelPoint

log = logging.getLogger("strata.planner.profile_kernels")

COLUMNS = (1, 4, 16, 128)
_SECONDS_A_POINT = 0.02
_TUNING_S_A_TYPE = 0.8
_PASSES = 2  # of which the better one counts: other programs only ever slow down
_LIMIT_S = 120


@dataclass(frozen=True, slots=True)
class KernelPoints:
    """Points by the names of quant types, and the choice of kernels behind them; None: the usual ones."""

    types: Mapping[str, tuple[KernelPoint, ...]] = field(default_factory=dict)
    tuning: Tuning | None = None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Types that are to be measured: without points, or without a choice for the ISA in use unless it is forced."""
        from cpu_kernels.isa import current, is_forced  # noqa: PLC0415 - brings a part of the compiler

        chosen = self.tuning.choices if self.tuning is not None and self.tuning.isa == current().name else {}
        return sorted(name for name in names if name not in self.types or not (is_forced() or name in chosen))

    def updated(self, newer: "KernelPoints") -> "KernelPoints":
        """With what `newer` has in place of its own."""
        tuning = newer.tuning if self.tuning is None else self.tuning.updated(newer.tuning)
        return KernelPoints({**self.types, **newer.types}, tuning)


def measure_apart(quant_types: Iterable[str], threads: int) -> KernelPoints:
    """`measure` in a process of its own; empty, and logged, where that fails: figures are derived then."""
    names = list(quant_types)
    try:
        return measured_apart(KernelPoints, __name__, names, threads, limit_s=_LIMIT_S)
    except FAILURES as error:
        log.warning("the kernels of %s could not be measured: %s", ", ".join(names), error)
        return KernelPoints()


def measure(quant_types: Iterable[str], threads: int) -> KernelPoints:
    """Chooses kernels for every type that has some, on `threads`, and measures those there and on one thread.

    A second a type, compiling not counted. Where `STRATA_ISA` forces a rung, the usual kernels are measured.
    """
    from cpu_kernels.formats import chosen_format, has_panel_format  # noqa: PLC0415 - brings the compiler
    from cpu_kernels.isa import current, is_forced  # noqa: PLC0415
    from cpu_kernels.measure import format_table  # noqa: PLC0415
    from cpu_kernels.quant_types import quant_type  # noqa: PLC0415
    from cpu_kernels.tune import tune  # noqa: PLC0415

    isa = current()
    kinds = [kind for kind in map(quant_type, quant_types) if has_panel_format(kind)]
    tuning = None if is_forced() else tune(kinds, threads=threads, seconds_budget=_TUNING_S_A_TYPE * len(kinds))
    forms = [chosen_format(kind, isa, tuning) for kind in kinds]
    points: dict[str, list[KernelPoint]] = {kind.name: [] for kind in kinds}
    for count in sorted({1, threads}):
        budget = _SECONDS_A_POINT * len(kinds) * len(COLUMNS)
        for _ in range(_PASSES):
            for figure in format_table(forms, COLUMNS, threads=count, seconds_budget=budget, isa=isa):
                rates = (1e9 * figure.gb_per_s, 1e9 * figure.gmac_per_s)
                points[figure.quant_type].append(KernelPoint(count, figure.columns, *rates))
    return KernelPoints({name: _undisturbed(found) for name, found in points.items()}, tuning)


def _undisturbed(points: Iterable[KernelPoint]) -> tuple[KernelPoint, ...]:
    """The best of every place, without what other programs' interference made impossible.

    More columns never take less time: where they seem to, fewer were disturbed, and are given the time of more.
    """
    best: dict[tuple[int, int], KernelPoint] = {}
    for point in points:
        place = (point.threads, point.columns)
        if place not in best or best[place].bytes_per_s < point.bytes_per_s:
            best[place] = point
    kept: list[KernelPoint] = []
    for point in sorted(best.values(), key=lambda point: (point.threads, -point.columns)):
        if kept and kept[-1].threads == point.threads and kept[-1].bytes_per_s > point.bytes_per_s:
            rate = kept[-1].bytes_per_s
            point = replace(point, bytes_per_s=rate, macs_per_s=point.macs_per_s * rate / point.bytes_per_s)  # noqa: PLW2901
        kept.append(point)
    return tuple(sorted(kept, key=lambda point: (point.threads, point.columns)))
