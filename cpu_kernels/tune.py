"""Chooses, for each quant type, the kernel family and tile shape that is fastest on this machine.

A matrix lies in memory once, and its product must not depend on how many columns are multiplied together, so that a
choice holds for every number of columns. The default needs no measurement: dot products. Another tile replaces it only
if it is no slower at one column, which decides how fast text is written, and at least 5% faster over all. Tables must
be 10% faster at one column besides, since they round activations more coarsely: on random models the logits' KL
divergence from float32 is 3 to 7 times that of dot products.
Knows nothing about models, nor where a `Tuning` is kept.
"""

import math
from collections.abc import Iterable, Sequence

from cpu_kernels import isa as ladder
from cpu_kernels.formats import PanelFormat, has_panel_format, panel_format
from cpu_kernels.isa import ISA
from cpu_kernels.measure import Bench
from cpu_kernels.quant_types import QuantType
from cpu_kernels.tuning import Choice, Family, Tuning

TUNED_COLUMNS = (1, 2, 4, 8, 16, 32, 128)
_TILES = (4, 8)
_SLOWER_ALONE = 1.02  # at one column: noise
_FASTER_ALONE = 0.9  # at one column: what makes coarser rounding worth it
_FASTER_OVERALL = 0.95
_MOST_BYTES = 1.08  # of the file's: what a loaded model may take
_PASSES = 2  # of which the better counts: other programs only ever slow down


def tune(
    quant_types: Iterable[QuantType], *, threads: int = 1, seconds_budget: float = 0.8, isa: ISA | None = None
) -> Tuning:
    """Measures every family and tile shape whose panels take little more than the file's bytes, for the types given.

    About `seconds_budget` are spent measuring, ten runs of each at least (20 ms a candidate); compiling what is not
    cached, some 0.1 s a kernel, comes on top. NotImplementedError where the system has no clock for it.
    """
    used = isa or ladder.current()
    candidates = {kind.name: _candidates(kind, used) for kind in quant_types if has_panel_format(kind)}
    count = sum(len(forms) for forms in candidates.values())
    if not count:
        return Tuning(used.name)
    share = seconds_budget / (count * len(TUNED_COLUMNS) * _PASSES)
    with Bench(threads) as bench:
        return Tuning(used.name, {name: _choice(bench, forms, share) for name, forms in candidates.items()})


def _choice(bench: Bench, forms: Sequence[PanelFormat], seconds_a_figure: float) -> Choice:
    passes = [
        [[bench.time(form, n, seconds_a_figure).product for n in TUNED_COLUMNS] for form in forms]
        for _ in range(_PASSES)
    ]
    seconds = [tuple(map(min, *times)) for times in zip(*passes, strict=True)]
    best = fastest(seconds, [form.family is Family.TABLES for form in forms])
    return Choice(forms[best].family, forms[best].isa.tile_columns, seconds[best])


def _candidates(quant_type: QuantType, isa: ISA) -> list[PanelFormat]:
    """The default first."""
    default = panel_format(quant_type, isa)
    tiles = [default.isa.tile_columns, *(tile for tile in _TILES if tile != default.isa.tile_columns)]
    result = [default.with_tile(tile) for tile in tiles]
    if has_panel_format(quant_type, Family.TABLES):
        tables = panel_format(quant_type, isa, Family.TABLES)
        columns = tables.layout.step_columns
        if tables.group_bytes(columns) <= _MOST_BYTES * tables.group_rows * quant_type.row_bytes(columns):
            result.append(tables)
    return result


def fastest(seconds: Sequence[Sequence[float]], are_tables: Sequence[bool]) -> int:
    """Which candidate to take; `seconds` of each at one column first, those of the default before the others."""
    best, best_ratio = 0, _FASTER_OVERALL
    for index, (times, is_table) in enumerate(zip(seconds, are_tables, strict=True)):
        ratios = [mine / default for mine, default in zip(times, seconds[0], strict=True)]
        overall = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if ratios[0] <= (_FASTER_ALONE if is_table else _SLOWER_ALONE) and overall < best_ratio:
            best, best_ratio = index, overall
    return best
