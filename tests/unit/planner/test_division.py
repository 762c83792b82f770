"""RAM that holds neither a model nor its context: how it is divided between experts, and keys and values."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import DoesNotFitError, RequestError
from offload.flash_probe import STREAMING_POINTS
from planner.budget import MIB, Budget
from planner.division import divisions
from planner.drive import streaming_here
from planner.folders import spill_folder
from planner.kv_spill import all_kv_bytes, least_kv_ram_bytes, spilling_here
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.prediction import Bottleneck
from planner.profile import with_drive
from planner.profile_spill import with_spill_rates
from planner.question import Here, Question, Wish, ask
from planner.solve import solve
from planner.streamed import Streaming, hit_curve, least_slots, step_seconds, streamed_needs
from planner.ways import PROGRAM, WAYS, fit_way
from tests.support.planning import header, profile

MODEL = header(layers=8, width=512, heads=8, kv_heads=8, ffn=1024, experts=32, used=4, context=1 << 17)
CONTEXT = 1 << 16
SHAPE = ModelShape.from_gguf(MODEL)  # type: ignore[arg-type]


def budget_of(num_bytes: int) -> Budget:
    return Budget(num_bytes, 0, "--budget", "no GPU")


def question(ram_bytes: int, *, context: int = CONTEXT, **wishes: object) -> Question:
    wish = Wish(context, 2, loop=PROGRAM, **wishes)
    known = with_spill_rates(with_drive(profile(), Path("models"), points=STREAMING_POINTS), spill_folder())
    return ask(MODEL, budget_of(ram_bytes), Here(known), wish)  # type: ignore[arg-type]


def least_ram() -> int:
    """Less does for no plan."""
    held = {"context_tokens": CONTEXT, "chunk_tokens": 1, "slots": least_slots(SHAPE, 1)}
    needs = streamed_needs(SHAPE, budget_of(1 << 40), **held, kv_ram_bytes=least_kv_ram_bytes(SHAPE, CONTEXT))
    return needs.ram.needed_bytes


def checked(plan: Plan, ram_bytes: int) -> Plan:
    assert plan.needs.ram.needed_bytes <= ram_bytes
    assert plan.predicted.decode_tokens_per_s > 0
    return plan


def test_what_spilling_makes_possible_is_never_refused() -> None:
    least = least_ram()
    plan = checked(solve(question(least)), least)
    assert plan.settings.stream_slots >= least_slots(SHAPE, 1)
    assert plan.settings.kv_ram_bytes == least_kv_ram_bytes(SHAPE, CONTEXT)
    assert any(note.startswith("KV: ") for note in plan.notes)
    assert any("read from flash when needed" in note for note in plan.notes)
    with pytest.raises(DoesNotFitError) as refused:
        solve(question(least - MIB))
    assert refused.value.needed_bytes == least


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 100), st.sampled_from([512, 4096, CONTEXT]), st.sampled_from([None, 1, 20000]))
def test_a_division_keeps_to_the_budget(share: int, context: int, prompt: int | None) -> None:
    ram = least_ram() + share * (SHAPE.num_bytes + all_kv_bytes(SHAPE, CONTEXT)) // 100
    plan = checked(solve(question(ram, context=context, prompt_tokens=prompt)), ram)
    kept = plan.settings.kv_ram_bytes
    assert kept is None or least_kv_ram_bytes(SHAPE, context) <= kept <= all_kv_bytes(SHAPE, context)


def test_more_ram_makes_it_quicker() -> None:
    plans = []
    for share in (0, 30, 90):
        ram = least_ram() + share * (SHAPE.num_bytes + all_kv_bytes(SHAPE, CONTEXT)) // 100
        plans.append(solve(question(ram, prompt_tokens=8192)))
    speeds = [plan.predicted.decode_tokens_per_s for plan in plans]
    for slower, quicker in pairwise(speeds):
        assert slower < quicker * 1.1
    assert speeds[0] < speeds[-1] / 2
    assert plans[0].settings.stream_slots > 0
    assert plans[-1].settings.stream_slots == 0


def test_the_division_is_the_quickest_of_those_compared() -> None:
    ram = least_ram() + (SHAPE.num_bytes + all_kv_bytes(SHAPE, CONTEXT)) // 4
    asked = question(ram, prompt_tokens=8192)
    best = solve(asked).predicted.decode_tokens_per_s
    spilled = fit_way(SHAPE, asked.budget, WAYS[PROGRAM][-1], CONTEXT)
    assert spilled is not None
    sizes = {fit.kv_ram_bytes for fit in divisions(SHAPE, asked.budget, spilled)}
    assert len(sizes) >= 5
    for size in sorted(size for size in sizes if size is not None)[::4]:
        fixed = replace(asked, wish=replace(asked.wish, kv_ram_bytes=size))
        assert solve(fixed).predicted.decode_tokens_per_s <= best * 1.2, "prompts count too"


def test_a_limit_for_keys_and_values_is_kept() -> None:
    ram = least_ram() + 200 * MIB
    least = least_kv_ram_bytes(SHAPE, CONTEXT)
    assert solve(question(ram, kv_ram_bytes=least)).settings.kv_ram_bytes == least
    with pytest.raises(RequestError, match="is too little for 65536 tokens"):
        solve(question(ram, kv_ram_bytes=least - 1))


def test_one_drive_brings_both() -> None:
    plan = solve(question(least_ram()))
    known = profile()
    streaming = streaming_here(SHAPE, known, plan.model, plan.settings)
    assert streaming is not None
    assert spilling_here(known, plan.settings) is not None
    alone, both = (
        step_seconds(SHAPE, 0.01, streaming, plan.settings, 1, read_ahead_s=seconds)[Bottleneck.FLASH]
        for seconds in (0.0, 1.0)
    )
    assert both == pytest.approx(alone + 1.0 - 0.01, rel=0.01), "the arithmetic alone hides reads"
    every = replace(plan.settings, stream_slots=1)
    prompt = [
        step_seconds(SHAPE, 1.0, Streaming(streaming.flash, hit_curve(SHAPE)), every, 512, read_ahead_s=seconds)
        for seconds in (0.0, 0.1)
    ]
    assert sum(prompt[1].values()) < sum(prompt[0].values()) + 0.05, "behind the arithmetic of a long chunk"
