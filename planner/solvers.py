"""The best placement that the solvers find, judged by the simulated step.

Small problems are solved exactly, all of them by patterns of layers; see `planner.milp` and `planner.patterns`. Every
solver's candidates are simulated and the quickest is taken, so that a plan is never worse than the greedy one or
llama.cpp's order of filling, whatever the closed form of the linear programs leaves out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from planner.fill_order import solve_fill_order
from planner.greedy import solve_greedy
from planner.milp import EXACT_OPTIONS, solve_milp
from planner.patterns import solve_patterns
from planner.placement import Assignment, PlacementProblem
from planner.simulate import step_seconds

TIME_LIMIT_S = 1.2  # of a linear program; those of the models measured end by themselves, the same way every time
NODES = 200  # of the exact search, which does not end soon among layers that are alike: 0.2 to 0.4 s


@dataclass(frozen=True, slots=True)
class Solution:
    """An assignment, the seconds of its simulated step, and which solver found it."""

    assignment: Assignment
    seconds: float
    solver: str


def best_assignment(problem: PlacementProblem) -> Solution | None:
    """The quickest candidate; None where none fits. Of equally quick ones the first, in the order of the solvers."""
    best: Solution | None = None
    for name, candidate in _candidates(problem):
        best = _quicker(problem, best, name, candidate)
    filled = solve_fill_order(problem, below_s=best.seconds if best is not None else math.inf)
    return best if filled is None else _quicker(problem, best, "fill order", filled)


def _quicker(problem: PlacementProblem, best: Solution | None, name: str, candidate: Assignment) -> Solution:
    seconds = step_seconds(problem, candidate)
    return best if best is not None and best.seconds <= seconds else Solution(candidate, seconds, name)


def _candidates(problem: PlacementProblem) -> Iterator[tuple[str, Assignment]]:
    """Those of the linear programs and of the greedy search."""
    if all(len(item.options) == 1 for item in problem.items):
        only = (0,) * len(problem.items)
        if problem.fits(only):
            yield "no choice", only
        return
    greedy = solve_greedy(problem)
    if sum(len(item.options) for item in problem.items) <= EXACT_OPTIONS:
        exact = solve_milp(problem, time_limit_s=TIME_LIMIT_S, node_limit=NODES)
        if exact is not None:
            yield "milp", exact
    for assignment in solve_patterns(problem, greedy, time_limit_s=TIME_LIMIT_S):
        yield "patterns", assignment
    for assignment in greedy:
        yield "greedy", assignment
