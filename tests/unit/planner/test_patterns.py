"""Counts of patterns: near the optimum of small problems, within the memories, quick for deep models."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.tiers import Device, Tier
from planner.layer_kinds import layer_kinds
from planner.model_shape import UnitKind
from planner.patterns import solve_patterns
from planner.placement import Item, Option, PlacementProblem
from planner.simulate import step_seconds
from tests.unit.planner.test_milp import brute_force, random_problem

GPU, RAM, FLASH = (Tier.GPU, Device.GPU), (Tier.RAM, Device.CPU), (Tier.FLASH, Device.CPU)


def option(place: tuple[Tier, Device], seconds: float, mebibytes: int, load_s: float = 0.0) -> Option:
    tier, device = place
    size = mebibytes << 20
    ram, gpu = (size if tier is Tier.RAM else 0), (size if tier is Tier.GPU else 0)
    return Option(tier, device, seconds, load_s, size if load_s else 0, ram, gpu)


def deep(layers: int, *, ram: int, gpu: int, classes: int = 8, handover_s: float = 2e-5) -> PlacementProblem:
    """Layers of attention and `classes` classes of experts, each half as popular as the one before; memories in MiB."""
    items: list[Item] = []
    for layer in range(layers):
        attention = option(GPU, 1e-4, 40), option(RAM, 1e-3, 40), option(FLASH, 1e-3, 40, 2e-2)
        items.append(Item(f"blk.{layer}.attention", UnitKind.ATTENTION, layer, attention))
        for number in range(classes):
            share = 0.5**number
            ways = (
                option(GPU, 1e-4 * share, 100),
                option(RAM, 1e-3 * share, 100),
                option(FLASH, 1e-3 * share, 100, 0.02),
            )
            items.append(Item(f"blk.{layer}.experts#{number}", UnitKind.EXPERTS, layer, ways, routed=True))
    return PlacementProblem(tuple(items), ram << 20, gpu << 20, handover_s)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9))
def test_fits_and_is_the_same_every_time(seed: int) -> None:
    problem = random_problem(seed, most_items=12)
    found = solve_patterns(problem)
    assert all(problem.fits(assignment) for assignment in found)
    assert found == solve_patterns(problem)
    assert bool(found) == (brute_force(problem) is not None)


@pytest.mark.parametrize(("ram", "gpu"), [(1700, 900), (1100, 300), (600, 1500), (4000, 4000)])
def test_near_the_best_of_a_few_layers(ram: int, gpu: int) -> None:
    problem = deep(4, ram=ram, gpu=gpu, classes=2, handover_s=1e-4)
    best = brute_force(problem)
    assert best is not None
    found = min(step_seconds(problem, assignment) for assignment in solve_patterns(problem))
    assert found <= 1.02 * step_seconds(problem, best)


def test_nothing_fits() -> None:
    problem = deep(4, ram=100, gpu=100)
    no_flash = tuple(replace(item, options=item.options[:2]) for item in problem.items)
    assert solve_patterns(replace(problem, items=no_flash)) == ()


def test_known_patterns_need_not_fit() -> None:
    problem = deep(4, ram=100, gpu=100)
    assert solve_patterns(problem, [(0,) * len(problem.items)])


def test_a_hundred_layers_are_placed_within_two_seconds() -> None:
    problem = deep(100, ram=40_000, gpu=20_000)
    started = time.monotonic()
    found = solve_patterns(problem)
    assert time.monotonic() - started < 2.0
    assert found
    assert found == solve_patterns(problem)
    ram, gpu = problem.held_bytes(found[0])
    assert ram > 0.98 * problem.ram_bytes
    assert gpu > 0.98 * problem.gpu_bytes


def test_layers_of_the_same_options_are_one_kind() -> None:
    kinds = layer_kinds(deep(5, ram=1, gpu=1))
    assert [len(kind.layers) for kind in kinds] == [5]
    assert not kinds[0].is_small
    assert kinds[0].layers[1] == tuple(range(9, 18))
