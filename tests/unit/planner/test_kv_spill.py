"""Keys and values on flash as plans count them: what stays in RAM, what a step reads, and how long that takes."""

from dataclasses import replace

import pytest

from cpu_kernels.kv_policy import KVPolicy
from planner.kv_spill import (
    Spilling,
    cold_bytes,
    kv_ram_bytes,
    least_kv_ram_bytes,
    reading_seconds,
    spill_notes,
    spilled_seconds,
    spread_in,
)
from planner.machine import AttentionPoint, SpillRates
from planner.machine_here import cpu_here
from planner.model_shape import ModelShape, UnitKind
from planner.plan import WeightsForm
from planner.prediction import Bottleneck
from planner.unit_cost import cpu_attention_seconds
from planner.ways import held_units
from tests.support.planning import header, profile

DEPTH = 16384
PIECES = DEPTH // 512
PLAIN = ModelShape.from_gguf(header(layers=16, width=2048, heads=32, kv_heads=8))
CHOSEN = PLAIN.with_kv(KVPolicy(budget_tokens=2048))
CHUNK = 512 * 2048  # 8 KV heads of 64 in float16
RATES = SpillRates(2e9, 1e9, 0.8, 5e8)


def half(shape: ModelShape) -> int:
    return kv_ram_bytes(shape, DEPTH, PIECES // 2)


def test_layers_that_are_read_whole_stay_in_ram() -> None:
    assert spread_in(PLAIN, DEPTH, half(PLAIN)).whole == PIECES // 2
    spread = spread_in(CHOSEN, DEPTH, half(CHOSEN))
    assert spread.whole == PIECES
    assert PIECES // 2 - 3 <= spread.part < PIECES // 2
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


def test_steps_wait_for_what_they_choose() -> None:
    spilling = Spilling(RATES, half(CHOSEN))
    seconds = spilled_seconds(CHOSEN, {Bottleneck.RAM_BANDWIDTH: 10.0}, spilling, DEPTH)
    assert seconds[Bottleneck.FLASH] == pytest.approx(cold_bytes(CHOSEN, DEPTH, spilling.ram_bytes) / 5e8)


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
        return list(spill_notes(shape, DEPTH, Spilling(rates, half(PLAIN))))

    assert len(notes(PLAIN, 1e8)) == len(notes(CHOSEN, 2e9)) == 1
    assert "reading all" in notes(CHOSEN, 1e8)[1]


@pytest.mark.parametrize("ram_bytes", [0, 7, 10**9 + 6])
def test_the_ram_of_all_layers_adds_up(ram_bytes: int) -> None:
    units = held_units(PLAIN, WeightsForm.PACKED, DEPTH, ram_bytes)
    assert sum(num_bytes for _, kind, num_bytes in units if kind is UnitKind.KV) == ram_bytes
