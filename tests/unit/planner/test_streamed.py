"""Plans of models whose experts are read from flash: what they need, what they miss, what that takes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.budget import Budget
from planner.hit_curve import assumed_curve
from planner.machine import Flash, FlashPoint
from planner.model_shape import ModelShape
from planner.plan import Settings, WeightsForm
from planner.prediction import Bottleneck
from planner.streamed import (
    Streaming,
    all_slots,
    hit_curve,
    least_slots,
    missed_bytes,
    slot_bytes,
    step_seconds,
    streamed_needs,
)
from planner.ways import EXECUTED, fit_way, ways_for
from tests.support.shapes import SHAPES

MIB = 1 << 20
OLMOE, DENSE_1B = SHAPES["OLMoE 7B, 1B active"], SHAPES["dense 1B"]
STREAMS = next(way for way in EXECUTED if way.streams)
FLASH = Flash("drive", (FlashPoint(1 << 20, 4, True, 2e9),), 0.0, 0)
SETTINGS = Settings(4096, 512, 2, WeightsForm.PACKED, "program", "cpu", stream_slots=500)


def test_both_kinds_of_models_can_be_streamed() -> None:
    assert ways_for("auto", DENSE_1B, has_gpu=False)[-1].streams
    assert ways_for("auto", OLMOE, has_gpu=False)[-1].streams
    assert not any(way.streams for way in ways_for("sequential", OLMOE, has_gpu=False))


def budget_of(ram_bytes: int) -> Budget:
    return Budget(ram_bytes, 0, "--budget", "no GPU")


@settings(max_examples=60, deadline=None)
@given(shape=st.sampled_from([OLMOE, DENSE_1B]), ram=st.integers(1, 6000), context=st.integers(1, 8192))
def test_a_plan_never_exceeds_the_budget(shape: ModelShape, ram: int, context: int) -> None:
    budget = budget_of(ram_bytes=ram * MIB)
    fit = fit_way(shape, budget, STREAMS, context)
    if fit is None:
        least = streamed_needs(shape, budget, context_tokens=context, chunk_tokens=1, slots=least_slots(shape, 1))
        assert least.ram.needed_bytes > budget.ram_bytes
        return
    assert fit.needs.ram.needed_bytes <= budget.ram_bytes
    assert least_slots(shape, fit.chunk_tokens) <= fit.stream_slots <= all_slots(shape)
    one_more = streamed_needs(
        shape, budget, context_tokens=context, chunk_tokens=fit.chunk_tokens, slots=fit.stream_slots + 1
    )
    assert one_more.ram.needed_bytes > budget.ram_bytes or fit.stream_slots == all_slots(shape)


def test_slots_hold_the_largest_expert_in_pages() -> None:
    experts = [unit.num_bytes for unit in OLMOE.units if unit.kind.value == "experts"]
    assert slot_bytes(OLMOE) % 4096 == 0
    assert 0 <= slot_bytes(OLMOE) - max(experts) / OLMOE.expert_count < 4096


def test_misses_fall_with_slots() -> None:
    curve = hit_curve(OLMOE)
    for tokens in (1, 8, 512):
        missed = [missed_bytes(OLMOE, curve, slots=slots, tokens=tokens) for slots in range(0, 1025, 64)]
        assert missed == sorted(missed, reverse=True)
        assert missed[-1] == pytest.approx(0.0, abs=1e-3)
    whole = sum(unit.num_bytes for unit in OLMOE.units if unit.kind.value == "experts")
    assert missed_bytes(OLMOE, curve, slots=64, tokens=5000) == pytest.approx(whole, rel=1e-6), "a layer uses all slots"
    assert missed_bytes(OLMOE, curve, slots=64 + 480, tokens=5000) == pytest.approx(whole / 2, rel=1e-6)


def test_a_step_takes_what_reading_takes() -> None:
    uniform = assumed_curve(16, 64, 8, popularity_exponent=0.0)
    parts = step_seconds(OLMOE, 0.02, Streaming(FLASH, uniform), SETTINGS, 1)
    missed = missed_bytes(OLMOE, uniform, slots=500, tokens=1)
    assert parts[Bottleneck.FLASH] == pytest.approx(missed / 1.8e9)
    assert parts[Bottleneck.RAM_BANDWIDTH] == 0.02
    drive = replace(FLASH, points=(FlashPoint(1 << 20, 4, True, 1e8),))
    slow = step_seconds(OLMOE, 0.02, Streaming(drive, uniform), SETTINGS, 1)
    assert slow[Bottleneck.FLASH] == pytest.approx(20 * parts[Bottleneck.FLASH])


def test_reads_ahead_hide_behind_the_arithmetic_of_long_prompts() -> None:
    streaming = Streaming(FLASH, hit_curve(OLMOE))
    quick, slow = (step_seconds(OLMOE, cpu, streaming, SETTINGS, 512)[Bottleneck.FLASH] for cpu in (0.0, 1.0))
    assert slow < quick


def test_reads_of_long_prompts_wait_where_no_slots_are_free_to_read_ahead() -> None:
    streaming = Streaming(FLASH, hit_curve(OLMOE))

    def hidden(slots: int, experts_s: float) -> float:
        """Seconds of reads that a second of arithmetic hides, of which experts take so much."""
        missed = missed_bytes(OLMOE, streaming.curve, slots=slots, tokens=512)
        settings = replace(SETTINGS, stream_slots=slots)
        parts = step_seconds(OLMOE, 1.0, streaming, settings, 512, experts_s=experts_s)
        return missed / 1.8e9 - parts[Bottleneck.FLASH]

    assert hidden(80, 0.0) == pytest.approx(0.0), "all but 16 slots are the layer's that is computed"
    assert hidden(80, 0.5) == pytest.approx(0.4), "experts are computed while others of their layer land"
    assert 0.4 < hidden(160, 0.5) < hidden(320, 0.5), "a part of the next layer has slots"
    assert hidden(320, 0.0) == pytest.approx(hidden(320, 0.5)), "all of it has"


def test_refused_where_not_even_a_token_s_experts_fit() -> None:
    assert fit_way(OLMOE, budget_of(ram_bytes=300 * MIB), STREAMS, 4096) is None


def test_a_dense_model_reads_the_layers_that_do_not_stay() -> None:
    whole = sum(unit.num_bytes for unit in DENSE_1B.units if unit.layer is not None)
    curve = hit_curve(DENSE_1B)
    for slots, missing in ((2, 16), (9, 9), (15, 3), (16, 0)):
        for tokens in (1, 512):
            missed = missed_bytes(DENSE_1B, curve, slots=slots, tokens=tokens)
            assert missed == pytest.approx(whole * missing / 16, rel=1e-6), slots
    parts = step_seconds(DENSE_1B, 0.02, Streaming(FLASH, curve), replace(SETTINGS, stream_slots=9), 1)
    assert parts[Bottleneck.FLASH] == pytest.approx(whole * 9 / 16 / 1.8e9 - 0.02)
