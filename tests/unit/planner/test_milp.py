"""The linear program against all assignments of small problems, up to 12 units."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from offload.tiers import Device, Tier
from planner.milp import solve_milp
from planner.model_shape import UnitKind
from planner.placement import Assignment, Item, Option, PlacementProblem
from planner.stages import objective_seconds

PLACES = ((Tier.GPU, Device.GPU), (Tier.RAM, Device.CPU), (Tier.RAM, Device.GPU), (Tier.FLASH, Device.CPU))
MIB = 1 << 20


def random_problem(seed: int, *, least_items: int = 3, most_items: int = 8) -> PlacementProblem:
    """A few layers of one or two units and perhaps routed experts, in memories that hold a part of them."""
    draw = random.Random(seed)
    items: list[Item] = []
    layer = 0
    while len(items) < draw.randint(least_items, most_items):
        items.append(_item(draw, f"blk.{layer}.attention", layer, routed=False))
        if draw.random() < 0.6:
            items += [_item(draw, f"blk.{layer}.experts#{number}", layer, routed=True) for number in range(2)]
        layer += 1
    items = items[:most_items]
    total = sum(max(option.ram_bytes for option in item.options) for item in items)
    ram, gpu = int(draw.uniform(0.2, 1.2) * total), int(draw.uniform(0, 0.8) * total)
    return PlacementProblem(tuple(items), ram, gpu, draw.choice([0.0, 1e-4, 3e-3]))


def _item(draw: random.Random, name: str, layer: int, *, routed: bool) -> Item:
    size = draw.randint(1, 64) * MIB
    places = draw.sample(PLACES, draw.randint(1, 3))
    return Item(
        name,
        UnitKind.EXPERTS if routed else UnitKind.ATTENTION,
        layer,
        tuple(_option(draw, p, size) for p in places),
        routed,
    )


def _option(draw: random.Random, place: tuple[Tier, Device], size: int) -> Option:
    tier, device = place
    resident = tier.value == device.value or place == (Tier.RAM, Device.CPU)
    load_s = 0.0 if resident else size / draw.choice([5e8, 3e9, 1e10])
    return Option(
        tier,
        device,
        compute_s=size / draw.choice([1e10, 4e10, 2e11]),
        load_s=load_s,
        load_bytes=0 if resident else size,
        ram_bytes=size if tier is Tier.RAM else 0,
        gpu_bytes=size if tier is Tier.GPU else size // 4 if device is Device.GPU else 0,
    )


def brute_force(problem: PlacementProblem) -> Assignment | None:
    """The best of all assignments that fit, found item by item: a branch is left when it can no longer fit or win."""
    best: tuple[float, Assignment | None] = math.inf, None

    def grow(chosen: Assignment) -> None:
        nonlocal best
        some = replace(problem, items=problem.items[: len(chosen)])
        if not some.fits(chosen):
            return  # held bytes only grow
        if chosen and (seconds := objective_seconds(some, chosen)) >= best[0]:
            return  # and so does the step: another item adds to a stage, or a stage
        if len(chosen) == len(problem.items):
            best = seconds, chosen
            return
        for index in range(len(problem.items[len(chosen)].options)):
            grow((*chosen, index))

    grow(())
    return best[1]


@pytest.mark.parametrize("seed", range(20))
def test_the_brute_force_misses_nothing(seed: int) -> None:
    problem = random_problem(seed, most_items=6)
    every = itertools.product(*(range(len(item.options)) for item in problem.items))
    best = min((objective_seconds(problem, chosen) for chosen in every if problem.fits(chosen)), default=None)
    found = brute_force(problem)
    assert best == (None if found is None else objective_seconds(problem, found))


@pytest.mark.parametrize("seed", range(200))
def test_equals_brute_force(seed: int) -> None:
    problem = random_problem(seed, least_items=12 if seed % 4 == 0 else 3, most_items=12)
    best = brute_force(problem)
    found = solve_milp(problem)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert problem.fits(found)
    assert objective_seconds(problem, found) == pytest.approx(objective_seconds(problem, best), rel=1e-6, abs=1e-9)


def test_a_quarter_of_the_instances_have_twelve_units() -> None:
    assert {len(random_problem(seed, least_items=12, most_items=12).items) for seed in range(0, 200, 4)} == {12}
