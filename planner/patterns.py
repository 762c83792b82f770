"""Placements of deep models: how many layers of each kind take which pattern.

A linear program counts the layers of each pattern, and its prices say which patterns are missing: column generation,
after Dantzig and Wolfe, "Decomposition principle for linear programs", 1960. A missing pattern is the solution of a
program of one layer, so that the size of the whole does not grow with the depth. Counts become positions in several
orders, since what is loaded ahead likes to be spread and hand-overs like runs. Knows nothing about models.

Invariants: what is handed on fits, and rounds are counted; only a search that takes longer than its limit is cut short.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from offload.tiers import Device
from planner.layer_kinds import LayerKind, PatternCost, layer_kinds
from planner.milp import MIB, SCALE, SLACK, Prices, Program, quiet
from planner.placement import Assignment, PlacementProblem

ROUNDS = 40
GAIN = 1e-4  # of the step: a round that promises less ends the search
_STEPS = 4  # at most, from a pattern found to better ones near it
_PATTERN_GAP = 1e-3
_PENALTY = 10.0  # a MiB too much costs this many of the slowest steps
_LEAST_LIMIT_S = 0.1
_LOADING = 0.05  # of the loads counts as time even where it hides: what memory has room for is not loaded

Count = tuple[int, Assignment, int]  # kind, pattern, layers that take it


def solve_patterns(
    problem: PlacementProblem, start: Sequence[Assignment] = (), *, time_limit_s: float = 1.0
) -> tuple[Assignment, ...]:
    """Assignments that fit, of the same counts in several orders; the patterns of `start` are known beforehand.

    Empty where nothing fits or nothing was found within the limit.
    """
    end = time.monotonic() + time_limit_s
    kinds = layer_kinds(problem)
    master = _Master(problem, kinds, start)
    programs = [None if kind.is_small else Program(kind.one, cyclic=kind.repeats) for kind in kinds]
    for _ in range(ROUNDS if any(programs) else 0):
        step, prices, most = master.prices()
        saved = 0.0
        for number, program in enumerate(programs):
            if program is not None and (left := end - time.monotonic()) > 0:
                found = program.solve(program.priced(prices), gap=_PATTERN_GAP, time_limit_s=left)
                if found is not None:
                    saved += len(kinds[number].layers) * master.take(number, found, prices, most[number])
        if saved <= GAIN * step:
            break
    counts = master.counts(max(end - time.monotonic(), _LEAST_LIMIT_S))
    orders = (_runs, _runs_back, _spread) if counts else ()
    placed = (_placed(problem, kinds, counts, order) for order in orders)
    return tuple(dict.fromkeys(assignment for assignment in placed if problem.fits(assignment)))


class _Master:
    """The program of counts. Columns: a count for each pattern, the step, MiB of RAM and of GPU memory too many."""

    def __init__(self, problem: PlacementProblem, kinds: Sequence[LayerKind], start: Iterable[Assignment]) -> None:
        self._kinds = kinds
        self._costs: dict[tuple[int, Assignment], PatternCost] = {}
        self._taken: list[tuple[int, Assignment]] = []
        self._room = np.array([0, 0, 0, problem.ram_bytes / MIB - SLACK, problem.gpu_bytes / MIB - SLACK])
        slowest = sum(max(option.compute_s + option.load_s for option in item.options) for item in problem.items)
        self._penalty = _PENALTY * SCALE * slowest
        start = tuple(start)
        for number, kind in enumerate(kinds):
            first = (0,) * len(kind.one.items)
            for pattern in dict.fromkeys(kind.every() if kind.is_small else (first, *kind.of(start))):
                self._taken.append((number, pattern))

    def take(self, kind: int, found: Assignment, prices: Prices, most: float) -> float:
        """Take in `found` and what is near it where it costs less than `most` at these prices; the most it saves."""
        saved, here = 0.0, found
        for _ in range(_STEPS):
            around = [(self._priced(kind, pattern, prices), pattern) for pattern in self._kinds[kind].near(here)]
            known = set(self._taken)
            self._taken += [(kind, near) for cost, near in around if cost < most and (kind, near) not in known]
            cost, best = min(around)
            if most - cost <= saved:
                break
            saved, here = most - cost, best
        return saved

    def prices(self) -> tuple[float, Prices, list[float]]:
        """(the step in milliseconds if layers could be divided, its prices, what a layer of each kind costs)."""
        from scipy.optimize import linprog  # noqa: PLC0415 - see planner.milp

        costs, rows, equal, layers = self._program()
        with quiet():
            result = linprog(costs, A_ub=rows, b_ub=self._room, A_eq=equal, b_eq=layers, method="highs")
        second, flash, link, ram, gpu = np.maximum(-result.ineqlin.marginals, 0.0).tolist()
        prices = Prices(second, flash + _LOADING, link + _LOADING, ram, gpu)
        return float(result.fun), prices, result.eqlin.marginals.tolist()

    def counts(self, time_limit_s: float) -> tuple[Count, ...]:
        """The patterns that are taken; empty where nothing fits."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415 - see planner.milp

        costs, rows, equal, layers = self._program()
        number = len(self._taken)
        with quiet():
            result = milp(
                costs,
                constraints=[LinearConstraint(rows, -np.inf, self._room), LinearConstraint(equal, layers, layers)],
                integrality=np.array([1] * number + [0] * 3),
                bounds=Bounds(0, np.array([np.inf] * (number + 1) + [0.0] * 2)),  # nothing too many
                options={"time_limit": time_limit_s, "mip_rel_gap": GAIN},
            )
        if result.x is None:
            return ()
        taken = zip(self._taken, result.x[:number].round().astype(int).tolist(), strict=True)
        return tuple((kind, pattern, count) for (kind, pattern), count in taken if count)

    def _program(self) -> tuple[Any, Any, Any, Any]:
        """(costs, rows of at most `_room`, a row for each kind, its layers)."""
        number = len(self._taken)
        rows = np.zeros((5, number + 3))
        rows[:, :number] = np.array([self._row(*pattern) for pattern in self._taken]).T
        costs = np.concatenate([_LOADING * (rows[1] + rows[2])[:number], [1.0, self._penalty, self._penalty]])
        rows[:3, number] = -1
        rows[3, number + 1] = rows[4, number + 2] = -1
        equal = np.zeros((len(self._kinds), number + 3))
        equal[[kind for kind, _ in self._taken], range(number)] = 1
        return costs, rows, equal, np.array([float(len(kind.layers)) for kind in self._kinds])

    def _row(self, kind: int, pattern: Assignment) -> tuple[float, float, float, float, float]:
        """What a layer takes, in milliseconds and MiB."""
        if (kind, pattern) not in self._costs:
            self._costs[kind, pattern] = self._kinds[kind].cost(pattern)
        cost = self._costs[kind, pattern]
        times = SCALE * cost.seconds, SCALE * cost.flash_s, SCALE * cost.link_s
        return *times, cost.ram_bytes / MIB, cost.gpu_bytes / MIB

    def _priced(self, kind: int, pattern: Assignment, prices: Prices) -> float:
        each = (prices.second, prices.flash_s, prices.link_s, prices.ram_mib, prices.gpu_mib)
        return sum(price * amount for price, amount in zip(each, self._row(kind, pattern), strict=True))


def _placed(
    problem: PlacementProblem,
    kinds: Sequence[LayerKind],
    counts: Sequence[Count],
    order: Callable[[Sequence[tuple[Assignment, int]]], Sequence[Assignment]],
) -> Assignment:
    """The assignment in which the layers of each kind take its patterns in that order."""
    chosen = [0] * len(problem.items)
    for number, kind in enumerate(kinds):
        taken = [(pattern, count) for which, pattern, count in counts if which == number]
        taken.sort(key=lambda each, kind=kind: _likeness(kind.one, each[0]))  # type: ignore[misc]
        for layer, pattern in zip(kind.layers, order(taken), strict=True):
            for position, option in zip(layer, pattern, strict=True):
                chosen[position] = option
    return tuple(chosen)


def _likeness(one: PlacementProblem, pattern: Assignment) -> tuple[int, float, Assignment]:
    """Puts patterns that are alike side by side: by how many items are computed on the CPU, then by their loads."""
    chosen = one.chosen(pattern)
    return sum(option.device is Device.CPU for option in chosen), sum(option.load_s for option in chosen), pattern


def _runs(taken: Sequence[tuple[Assignment, int]]) -> Sequence[Assignment]:
    return [pattern for pattern, count in taken for _ in range(count)]


def _runs_back(taken: Sequence[tuple[Assignment, int]]) -> Sequence[Assignment]:
    return _runs(taken)[::-1]


def _spread(taken: Sequence[tuple[Assignment, int]]) -> Sequence[Assignment]:
    """Each pattern as evenly over the layers as it goes."""
    places = [((index + 0.5) / count, which) for which, (_, count) in enumerate(taken) for index in range(count)]
    return [taken[which][0] for _, which in sorted(places)]
