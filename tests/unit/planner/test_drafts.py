"""What a draft model is planned to cost and bring."""

from dataclasses import replace

import pytest

from offload.gguf import GGUFFile
from planner.drafts import draft_bytes, forecast, gain_at, left_over, pass_ratios, without
from planner.model_shape import ModelShape
from planner.profile import load_or_measure
from planner.solve import plan_here
from runtime.models import DEMO_DRAFT, DEMO_MODEL


@pytest.fixture(scope="module")
def shapes():
    with GGUFFile.open(DEMO_MODEL) as target, GGUFFile.open(DEMO_DRAFT) as draft:
        yield ModelShape.from_gguf(target), ModelShape.from_gguf(draft), plan_here(target), plan_here(draft)


def test_a_pass_over_more_tokens_never_costs_less(shapes):
    ratios = pass_ratios(shapes[0], load_or_measure(), 1, 17)
    assert ratios[0] == 1.0
    assert ratios == sorted(ratios)
    assert ratios[-1] < 17


def test_a_draft_is_forecast_with_its_ram_and_its_depth(shapes):
    target, draft, plan, draft_plan = shapes
    found = forecast(plan, target, draft_plan, draft, load_or_measure(), acceptance=0.9)
    assert found.gain >= 1.0
    assert found.gain == pytest.approx(found.depth.tokens_per_s / plan.predicted.decode_tokens_per_s)
    assert 2 << 20 < found.ram_bytes < 100 << 20
    assert "MiB of RAM" in str(found)
    assert forecast(plan, target, draft_plan, draft, load_or_measure(), acceptance=0.0).depth.drafts == 0
    assert "not expected to pay" in str(forecast(plan, target, draft_plan, draft, load_or_measure(), acceptance=0.0))


def test_longer_contexts_take_more(shapes):
    assert draft_bytes(shapes[1], 512) > draft_bytes(shapes[1], 64)


def test_what_is_left_over_holds_what_was_set_aside(shapes):
    plan = shapes[2]
    exact = replace(plan, budget=replace(plan.budget, ram_bytes=plan.needs.ram.needed_bytes))
    process = plan.needs.ram.process_bytes
    assert left_over(exact).ram_bytes == process
    assert left_over(exact, 1 << 20).ram_bytes == process + (1 << 20)
    assert left_over(plan).gpu_bytes == 0 or plan.budget.gpu_bytes > 0
    assert without(plan.budget, 1 << 60).ram_bytes == 0


def test_the_gain_of_cheap_passes_is_the_tokens_they_give():
    assert gain_at([1.0] * 17, 0.0, 1.0).tokens_per_s == pytest.approx(17)
    assert gain_at([float(n) for n in range(1, 18)], 0.0, 0.9).drafts == 0
