"""Keys and values on flash as plans count them: what stays in RAM, what a step reads, and how long that takes."""

import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.kv_policy import KVPolicy
from offload.kv_chunks import KEPT_PIECES
from planner.budget import format_size
from planner.folders import spill_folder
from planner.kv_spill import (
    LOOKED_UP_S,
    Spilling,
    all_kv_bytes,
    cold_bytes,
    kv_ram_bytes,
    least_kv_ram_bytes,
    reading_seconds,
    spill_notes,
    spill_room,
    spilled_seconds,
    spread_in,
)
from planner.machine import AttentionPoint, SpillRates
from planner.machine_here import cpu_here
from planner.model_shape import ModelShape, UnitKind
from planner.plan import WeightsForm
from planner.prediction import Bottleneck, Prediction, Residual
from planner.unit_cost import cpu_attention_seconds
from planner.ways import held_units
from tests.support.planning import header, profile

DEPTH = 16384
PIECES = DEPTH // 512
PLAIN = ModelShape.from_gguf(header(layers=16, width=2048, heads=32, kv_heads=8))
CHOSEN = PLAIN.with_kv(KVPolicy(budget_tokens=2048))
CHUNK = 512 * 2048  # 8 KV heads of 64 in float16
RATES = SpillRates(2e9, 1e9, 0.8, 5e8)
FULL = Prediction(3.0, 18.0, 900.0, 0, 0, Bottleneck.FLASH, DEPTH - 128, Residual(1.0, 0), Residual(1.0, 0))


def half(shape: ModelShape) -> int:
    return kv_ram_bytes(shape, DEPTH, PIECES // 2)


def test_layers_that_are_read_whole_stay_in_ram() -> None:
    assert spread_in(PLAIN, DEPTH, half(PLAIN)).whole == PIECES // 2
    spread = spread_in(CHOSEN, DEPTH, half(CHOSEN))
    assert spread.whole == PIECES
    assert KEPT_PIECES <= spread.part < PIECES // 2 - 3, "some of the RAM holds what is chosen most of all others"
    least = spread_in(CHOSEN, DEPTH, least_kv_ram_bytes(CHOSEN, DEPTH))
    assert 1 <= least.part <= 4 < least.whole


def test_a_token_reads_what_it_chooses_and_a_prompt_all() -> None:
    plain, chosen = (cold_bytes(shape, DEPTH, half(PLAIN)) for shape in (PLAIN, CHOSEN))
    assert plain == 16 * PIECES // 2 * CHUNK
    assert chosen < 0.28 * plain
    assert cold_bytes(CHOSEN, DEPTH, half(PLAIN), tokens=64) >= 4 * chosen


def test_chunks_and_their_index_are_all_of_the_memory() -> None:
    spread = spread_in(CHOSEN, DEPTH, half(CHOSEN))
    chunks = 2 * spread.whole + 14 * spread.part + spread.more
    index = DEPTH * sum(CHOSEN.kv_index_bytes(layer) for layer in range(16))
    assert 0.03 < index / (DEPTH * CHOSEN.kv_bytes_per_token) < 0.08
    assert chunks * CHUNK + index <= half(CHOSEN)


def test_reads_go_on_behind_what_is_computed() -> None:
    spilling = Spilling(RATES, half(PLAIN))
    num_bytes = cold_bytes(PLAIN, DEPTH, spilling.ram_bytes)
    alone = reading_seconds(PLAIN, spilling, DEPTH)
    assert alone == pytest.approx(num_bytes / 2e9)
    seconds = spilled_seconds(PLAIN, {Bottleneck.RAM_BANDWIDTH: 0.04}, spilling, DEPTH)
    total = sum(seconds.values())
    assert total == pytest.approx(0.05 + (num_bytes - 0.05e9) / 2e9)  # computing takes 50 ms beside the reads
    assert seconds[Bottleneck.RAM_BANDWIDTH] == 0.04
    long = sum(spilled_seconds(PLAIN, {Bottleneck.RAM_BANDWIDTH: 10.0}, spilling, DEPTH).values())
    assert long == pytest.approx(10.0 + 0.2 * num_bytes / 1e9)


def test_more_ram_for_what_is_chosen_most_means_fewer_reads() -> None:
    every = all_kv_bytes(CHOSEN, DEPTH)
    read = [cold_bytes(CHOSEN, DEPTH, every * tenths // 10) for tenths in range(4, 10)]
    assert read == sorted(read, reverse=True)
    uniform = [
        (PIECES - spread_in(CHOSEN, DEPTH, every * tenths // 10).part) * 14 * CHUNK // 4 for tenths in range(4, 10)
    ]
    assert all(least < most for least, most in zip(read, uniform, strict=True))


def test_steps_wait_for_what_they_choose() -> None:
    spilling = Spilling(RATES, half(CHOSEN))
    seconds = spilled_seconds(CHOSEN, {Bottleneck.RAM_BANDWIDTH: 10.0}, spilling, DEPTH)
    reading = cold_bytes(CHOSEN, DEPTH, spilling.ram_bytes) / 5e8
    assert seconds[Bottleneck.FLASH] == pytest.approx(reading + 14 * LOOKED_UP_S)


def test_attention_in_ram_counts_what_is_read() -> None:
    cpu = cpu_here(profile())
    whole, chosen = (cpu_attention_seconds(cpu, 4, shape, 2, 1, DEPTH) for shape in (PLAIN, CHOSEN))
    assert 0.25 < chosen / whole < 0.4  # a quarter of the tokens, and the index of all
    assert cpu_attention_seconds(cpu, 4, CHOSEN, 1, 1, DEPTH) == pytest.approx(whole, rel=0.01)
    prompts = [cpu_attention_seconds(cpu, 4, shape, 2, 64, DEPTH) for shape in (PLAIN, CHOSEN)]
    assert prompts[0] == pytest.approx(prompts[1])


def test_attention_is_as_fast_as_it_was_measured() -> None:
    cpu = cpu_here(profile())
    point = AttentionPoint(4, 10e9, 50e9)
    measured = replace(cpu, attention={"f16": (point,)})
    seconds = cpu_attention_seconds(measured, 4, PLAIN, 0, 1, DEPTH)
    assert seconds == pytest.approx(2048 * (DEPTH + 1) / 10e9, rel=0.01)
    tokens = 256
    macs = 32 * tokens * (DEPTH + tokens / 2) * 128
    assert cpu_attention_seconds(measured, 4, PLAIN, 0, tokens, DEPTH) == pytest.approx(macs / 50e9, rel=0.01)
    assert cpu_attention_seconds(measured, 1, PLAIN, 0, 1, DEPTH) == cpu_attention_seconds(cpu, 1, PLAIN, 0, 1, DEPTH)


def test_a_budget_that_takes_longer_than_reading_all_is_told() -> None:
    def notes(shape: ModelShape, parts_bytes_per_s: float) -> list[str]:
        rates = replace(RATES, parts_bytes_per_s=parts_bytes_per_s)
        return list(spill_notes(shape, DEPTH, Spilling(rates, half(PLAIN)), FULL))

    assert len(notes(PLAIN, 1e8)) == len(notes(CHOSEN, 2e9)) == 2
    assert "reading all" in notes(CHOSEN, 1e8)[2]


def test_what_a_full_context_takes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = Spilling(RATES, half(PLAIN))
    num_bytes = format_size(cold_bytes(PLAIN, DEPTH, spilling.ram_bytes))
    spread, full = spill_notes(PLAIN, DEPTH, spilling, FULL)
    assert f"the rest ({num_bytes}) on flash" in spread
    assert full.startswith(f"with the context full: 3.00 tokens/s, each reading {num_bytes} of KV from flash; ")
    assert full.endswith("after 15.0 min")
    monkeypatch.setattr("planner.kv_spill.spill_room", lambda: 100 << 20)
    assert "flash has room for 100 MiB of these" in list(spill_notes(PLAIN, DEPTH, spilling, FULL))[2]


def test_the_drive_that_would_be_written_to_is_asked_for_room() -> None:
    assert not spill_folder().exists() or spill_folder().is_dir()
    assert 0 <= spill_room() <= shutil.disk_usage(spill_folder().anchor).total


@given(st.integers(1, 400), st.integers(0, 1000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_as_much_is_in_ram_as_fits(every: int, share: int, has_budget: bool) -> None:
    shape, tokens = (CHOSEN if has_budget else PLAIN), every * 512
    ram_bytes = all_kv_bytes(shape, tokens) * share // 1000
    spread = spread_in(shape, tokens, ram_bytes)
    assert 0 <= spread.part <= spread.whole <= every
    if spread.part < 1:
        assert ram_bytes < kv_ram_bytes(shape, tokens, 1)
        return
    held = 2 * spread.whole + 14 * spread.part + spread.more if has_budget else 16 * spread.whole
    assert held * CHUNK <= ram_bytes
    if not has_budget and spread.whole < every:
        assert kv_ram_bytes(shape, tokens, spread.whole + 1) > ram_bytes


@pytest.mark.parametrize("ram_bytes", [0, 7, 10**9 + 6])
def test_the_ram_of_all_layers_adds_up(ram_bytes: int) -> None:
    units = held_units(PLAIN, WeightsForm.PACKED, DEPTH, ram_bytes)
    assert sum(num_bytes for _, kind, num_bytes in units if kind is UnitKind.KV) == ram_bytes
