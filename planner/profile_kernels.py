"""How fast this machine's kernels multiply matrices of a quant type, at several numbers of columns and threads.

Measured in a process of its own, so that neither its memory nor the compiler it imports counts as the caller's. Knows
nothing about profiles and where they are kept.
"""

import logging
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from planner import document
from planner.machine import KernelPoint

log = logging.getLogger("strata.planner.profile_kernels")

COLUMNS = (1, 4, 16, 128)
_SECONDS_A_POINT = 0.02
_PASSES = 2  # of which the better one counts: other programs only ever slow down
_LIMIT_S = 120


@dataclass(frozen=True, slots=True)
class KernelPoints:
    """Points by the names of quant types."""

    types: Mapping[str, tuple[KernelPoint, ...]]


def measure_apart(quant_types: Iterable[str], threads: int) -> Mapping[str, tuple[KernelPoint, ...]]:
    """`measure` in a process of its own; empty, and logged, where that fails: figures are derived then."""
    names = ",".join(quant_types)
    code = (
        "import sys; from planner import document, profile_kernels as kernels; "
        "print(document.dumps(kernels.measure(sys.argv[1].split(','), int(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, names, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=True)
        return document.loads(KernelPoints, done.stdout).types
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.warning("the kernels of %s could not be measured: %s", names, error)
        return {}


def measure(quant_types: Iterable[str], threads: int) -> KernelPoints:
    """Points of every type that has kernels, on one thread and on `threads`; 0.2 s a type, compiling not counted."""
    from cpu_kernels.formats import Family, has_panel_format  # noqa: PLC0415 - brings the compiler
    from cpu_kernels.measure import kernel_table  # noqa: PLC0415
    from cpu_kernels.quant_types import quant_type  # noqa: PLC0415

    kinds = [quant_type(name) for name in quant_types]
    kinds = [kind for kind in kinds if has_panel_format(kind)]
    points: dict[str, list[KernelPoint]] = {kind.name: [] for kind in kinds}
    for count in sorted({1, threads}):
        budget = _SECONDS_A_POINT * len(kinds) * len(COLUMNS)
        for _ in range(_PASSES):
            for figure in kernel_table(kinds, COLUMNS, threads=count, seconds_budget=budget):
                if figure.family is Family.DOT:
                    rates = (1e9 * figure.gb_per_s, 1e9 * figure.gmac_per_s)
                    points[figure.quant_type].append(KernelPoint(count, figure.columns, *rates))
    return KernelPoints({name: _undisturbed(found) for name, found in points.items()})


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
