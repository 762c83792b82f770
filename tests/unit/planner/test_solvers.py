"""The placements that the solvers find: within the memories, never worse than the simple ones, the same every time."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.tiers import Device, Tier
from planner.fill_order import solve_fill_order
from planner.greedy import can_fit, solve_greedy
from planner.model_shape import UnitKind
from planner.placement import Item, Option, PlacementProblem
from planner.simulate import step_seconds
from planner.solvers import best_assignment
from tests.unit.planner.test_milp import random_problem

GPU, RAM = (Tier.GPU, Device.GPU), (Tier.RAM, Device.CPU)


def option(place: tuple[Tier, Device], seconds: float, size: int = 10) -> Option:
    tier, device = place
    ram, gpu = (size if tier is Tier.RAM else 0), (size if tier is Tier.GPU else 0)
    return Option(tier, device, seconds, 0.0, 0, ram, gpu)


def layers(count: int, options: tuple[Option, ...], *, ram: int, gpu: int, handover_s: float = 0.0) -> PlacementProblem:
    items = tuple(Item(f"blk.{n}.attention", UnitKind.ATTENTION, n, options) for n in range(count))
    return PlacementProblem(items, ram, gpu, handover_s)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9))
def test_fits_and_is_never_worse(seed: int) -> None:
    problem = random_problem(seed, most_items=12)
    best = best_assignment(problem)
    greedy = solve_greedy(problem)
    filled = solve_fill_order(problem)
    simple = [*greedy, *([filled] if filled is not None else [])]
    assert all(problem.fits(assignment) for assignment in simple)
    if best is None:
        assert not simple
        return
    assert problem.fits(best.assignment)
    assert best.seconds == step_seconds(problem, best.assignment)
    assert all(best.seconds <= step_seconds(problem, assignment) for assignment in simple)
    assert best == best_assignment(problem)


def test_nothing_fits() -> None:
    problem = layers(2, (option(RAM, 1.0), option(GPU, 0.1)), ram=5, gpu=5)
    assert best_assignment(problem) is None
    assert solve_greedy(problem) == ()
    assert solve_fill_order(problem) is None


def test_no_choice_needs_no_solver() -> None:
    problem = layers(2, (option(RAM, 1.0),), ram=20, gpu=0)
    best = best_assignment(problem)
    assert best is not None
    assert (best.solver, best.seconds) == ("no choice", 2.0)
    assert best_assignment(replace(problem, ram_bytes=19)) is None


def test_the_gpu_takes_what_saves_most_for_its_bytes() -> None:
    small, large = (option(RAM, 1.0), option(GPU, 0.1)), (option(RAM, 1.2, 100), option(GPU, 0.1, 100))
    items = tuple(Item(f"blk.{n}.x", UnitKind.ATTENTION, n, ways) for n, ways in enumerate((large, small, small)))
    best = best_assignment(PlacementProblem(items, 1000, 100, 0.0))
    assert best is not None
    assert best.assignment == (0, 1, 1)


def test_handovers_can_cost_more_than_they_save() -> None:
    problem = layers(3, (option(RAM, 1.0), option(GPU, 0.9)), ram=100, gpu=10, handover_s=0.3)
    best = best_assignment(problem)
    assert best is not None
    assert best.seconds == pytest.approx(3.0)
    assert best.assignment == (0, 0, 0)


def test_fill_order_takes_the_last_layers_first() -> None:
    problem = layers(4, (option(GPU, 0.1), option(RAM, 1.0)), ram=100, gpu=20)
    assert solve_fill_order(problem) == (1, 1, 0, 0)


def test_fill_order_leaves_the_first_layers_on_flash() -> None:
    flash = Option(Tier.FLASH, Device.CPU, 1.0, 5.0, 10, 0, 0)
    problem = layers(4, (option(RAM, 1.0), flash), ram=25, gpu=0)
    assert solve_fill_order(problem) == (1, 1, 0, 0)


def test_no_memory_is_left_idle() -> None:
    problem = layers(8, (option(RAM, 1.0), option(GPU, 0.1)), ram=1000, gpu=45)
    best = best_assignment(problem)
    assert best is not None
    assert math.isclose(best.seconds, 4 * 1.0 + 4 * 0.1)


def test_without_flash_a_model_is_split_between_ram_and_the_gpu() -> None:
    problem = layers(8, (option(RAM, 1.0), option(GPU, 0.1)), ram=50, gpu=45)
    assert can_fit(problem)
    assert all(problem.fits(assignment) for assignment in solve_greedy(problem))
    best = best_assignment(problem)
    assert best is not None
    assert sum(best.assignment) == 4
    assert not can_fit(replace(problem, ram_bytes=30))
