"""The quick bound is never above the simulated step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.tiers import Device, Tier
from planner.least_time import LeastTime
from planner.model_shape import UnitKind
from planner.placement import Item, Option, PlacementProblem
from planner.simulate import step_seconds
from tests.unit.planner.test_milp import random_problem


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.data())
def test_no_step_is_shorter(seed: int, data: st.DataObject) -> None:
    problem = random_problem(seed, most_items=12)
    assignment = tuple(data.draw(st.integers(0, len(item.options) - 1)) for item in problem.items)
    assert LeastTime(problem).seconds(assignment) <= step_seconds(problem, assignment)


def test_what_follows_one_another_is_added_up() -> None:
    ram = Option(Tier.RAM, Device.CPU, 1.0, 0.0, 0, 10, 0)
    flash = Option(Tier.FLASH, Device.CPU, 1.0, 7.0, 10, 0, 0)
    items = tuple(Item(f"blk.{n}.attention", UnitKind.ATTENTION, n, (ram, flash)) for n in range(3))
    least = LeastTime(PlacementProblem(items, 100, 0, 0.0))
    assert least.seconds((0, 0, 0)) == pytest.approx(3.0)
    assert least.seconds((0, 1, 1)) == pytest.approx(14.0)
