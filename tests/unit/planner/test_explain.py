"""What a person sees of a plan: within 80 columns, every fact there."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from offload.tiers import Device, Tier
from planner.budget import GIB, MIB, Budget
from planner.explain import render_comparison, render_plan
from planner.plan import Plan
from planner.prediction import Measurement, Residual
from planner.solve import make_plan
from tests.support.planning import header, llama_8b, profile


def shown(plan: Plan, width: int = 80) -> str:
    file = io.StringIO()
    render_plan(Console(file=file, width=width, highlight=False), plan)
    return file.getvalue()


def moe(ram_bytes: int = GIB) -> Plan:
    model = header(layers=4, experts=16, used=2)
    return make_plan(model, budget=Budget(ram_bytes, 0, "--budget", "no GPU"), profile=profile())


def test_equal_layers_are_one_line() -> None:
    text = shown(moe())
    assert "0-3     attention, KV cache, router, experts (16, 2 used)" in text
    assert "output (shares the embedding)" in text
    assert "14.4M" not in text
    assert "active" in text.splitlines()[0]


def test_bar_and_prediction() -> None:
    plan = moe()
    text = shown(plan)
    assert "of 1.0 GiB" in text
    assert "█" in text
    assert "░" in text
    assert "(--budget)" in text
    assert f"{plan.predicted.decode_tokens_per_s:.0f} tokens/s" in text
    assert "bound by RAM bandwidth" in text.replace("\n", " ")
    assert "corrected" not in text


def test_corrections_and_notes_are_told() -> None:
    plan = moe()
    predicted = replace(plan.predicted, decode_correction=Residual(1.3, 4))
    text = " ".join(shown(replace(plan, predicted=predicted, notes=("mind [this]",))).split())
    assert "corrected by 1.3x from 4 earlier runs" in text
    assert "note mind [this]" in text


def test_parts_in_different_places_have_lines_of_their_own() -> None:
    plan = moe()
    placements = tuple(
        replace(p, tier=Tier.GPU, device=Device.GPU) if p.kind.value == "attention" and p.layer == 1 else p
        for p in plan.placements
    )
    lines = shown(replace(plan, placements=placements)).splitlines()
    assert any(line.startswith("0,2-3 ") for line in lines)
    assert any(line.startswith("1 ") and "attention" in line and "GPU" in line for line in lines)
    assert any(line.startswith("1 ") and "experts" in line and "RAM" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    for plan in (
        moe(),
        make_plan(llama_8b(), budget=Budget(8 * GIB, 0, "control group limit of 9.0 GiB", ""), profile=profile()),
    ):
        assert max(len(line) for line in shown(plan, width).splitlines()) <= width


def test_times_and_sizes_for_slow_and_large() -> None:
    plan = moe()
    model = replace(plan.model, num_parameters=3 * 10**12, active_parameters=999, expert_count=2)
    slow = replace(plan.predicted, ttft_s=300.0, decode_tokens_per_s=0.5)
    text = " ".join(shown(replace(plan, model=model, predicted=slow)).split())
    assert "3.0T parameters, 999 active" in text
    assert "after 5.0 min" in text
    assert "0.50 tokens/s" in text
    assert "12.0 s" in shown(replace(plan, predicted=replace(slow, ttft_s=12.0)))


def compared(plan: Plan, measured: Measurement) -> list[str]:
    file = io.StringIO()
    render_comparison(Console(file=file, width=80, highlight=False), plan.predicted, measured)
    return file.getvalue().splitlines()


def test_comparison_has_the_ratio() -> None:
    plan = moe()
    predicted = replace(plan.predicted, decode_tokens_per_s=100.0, ttft_s=0.2, peak_ram_bytes=400 * MIB)
    measured = Measurement(80.0, None, 0.1, 300 * MIB)
    lines = compared(replace(plan, predicted=predicted), measured)
    assert max(map(len, lines)) <= 80
    assert [line.split()[-1] for line in lines] == ["predicted", "0.80", "-", "0.50", "0.75"]
    assert "200 ms" in lines[3]
    assert "100 ms" in lines[3]


def test_comparison_holds_the_peak_against_the_budget() -> None:
    plan = moe()
    budget = Budget(1024 * MIB, 0, "test", "no GPU", ram_margin_bytes=224 * MIB)
    for peak, line in (
        (400 * MIB, "peak RAM is 50% of the 800 MiB that may be used"),
        (900 * MIB, "peak RAM is 112% of the 800 MiB that may be used: 100 MiB too much; plan with less context (-c)"),
    ):
        file = io.StringIO()
        console = Console(file=file, width=120, highlight=False)
        render_comparison(console, plan.predicted, Measurement(80.0, None, 0.1, peak), budget)
        assert file.getvalue().splitlines()[-1] == line


def test_comparison_leaves_out_prompts_of_other_lengths() -> None:
    plan = moe()
    lines = compared(plan, Measurement(80.0, 10.0, 0.1, 1, plan.predicted.prompt_tokens + 1))
    assert [line.split()[0] for line in lines[1:]] == ["decode", "peak"]
