"""The best placement that the solvers find, judged by the simulated step.

Every solver's candidates are simulated and the quickest is taken, so that a plan is never worse than the greedy one or
llama.cpp's order of filling, whatever the closed form of the linear program leaves out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from planner.fill_order import solve_fill_order
from planner.greedy import solve_greedy
from planner.milp import solve_milp
from planner.placement import Assignment, PlacementProblem
from planner.simulate import step_seconds

TIME_LIMIT_S = 1.2  # of the linear program, so that a plan of 100 layers x 256 experts stays below 2 s


@dataclass(frozen=True, slots=True)
class Solution:
    """An assignment, the seconds of its simulated step, and which solver found it."""

    assignment: Assignment
    seconds: float
    solver: str


def best_assignment(problem: PlacementProblem) -> Solution | None:
    """The quickest candidate; None where none fits. Of equally quick ones the first, in the order of the solvers."""
    solutions = (
        Solution(candidate, step_seconds(problem, candidate), name) for name, candidate in _candidates(problem)
    )
    return min(solutions, key=lambda solution: solution.seconds, default=None)


def _candidates(problem: PlacementProblem) -> Iterator[tuple[str, Assignment]]:
    if all(len(item.options) == 1 for item in problem.items):
        only = (0,) * len(problem.items)
        if problem.fits(only):
            yield "no choice", only
        return
    exact = solve_milp(problem, time_limit_s=TIME_LIMIT_S)
    if exact is not None:
        yield "milp", exact
    for assignment in solve_greedy(problem):
        yield "greedy", assignment
    filled = solve_fill_order(problem)
    if filled is not None:
        yield "fill order", filled
