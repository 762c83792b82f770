"""Hybrid plans whose keys and values neither the GPU nor RAM holds: how much lies where, and what reading it costs."""

from dataclasses import replace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import PlanError, RequestError
from offload.flash_probe import filesystem_key
from offload.gguf import GGUFFile
from offload.kv_chunks import staging_slots
from planner.budget import GIB, MIB, Budget
from planner.folders import spill_folder
from planner.hybrid_spill import HostKV, host_lost_seconds
from planner.hybrid_split import Split, split_of
from planner.kv_flash import flash_kv_bytes
from planner.kv_spill import Spilling
from planner.machine import SpillRates
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Plan
from planner.plan_check import check_runnable
from planner.prediction import Bottleneck
from planner.question import Here, Question, Wish, ask
from planner.solve import solve
from tests.support.planning import GPU, RATES, header, profile

MODEL = cast(GGUFFile, header(layers=16, width=2048, heads=32, kv_heads=8, ffn=8192, vocab=32000, context=1 << 17))
SHAPE = ModelShape.from_gguf(MODEL)
CONTEXT = 32768
CHUNK = 512 * 2048  # 8 KV heads of 64 in float16
PROCESS = 3 * GIB + 500 * MIB  # of RAM with a real GPU
DRIVE = SpillRates(2e9, 1e9, 0.8, 5e8)


def question(ram_bytes: int, gpu_bytes: int, drive: SpillRates = DRIVE, **wish: object) -> Question:
    spills = {filesystem_key(spill_folder()): drive}
    here = Here(replace(profile(), gpu=RATES, spills=spills), GPU)
    options = {"context_tokens": CONTEXT, "threads": 4, "loop": "hybrid", **wish}
    return ask(MODEL, Budget(ram_bytes, gpu_bytes, "test", "a GPU"), here, Wish(**options))  # type: ignore[arg-type]


def planned(gpu_bytes: int, kv_ram_bytes: int | None, drive: SpillRates = DRIVE, **wish: object) -> Plan:
    return solve(question(64 * GIB, gpu_bytes, drive, kv_ram_bytes=kv_ram_bytes, **wish))


def test_layers_of_the_cpu_have_all_and_those_of_the_gpu_what_it_may_not_hold() -> None:
    kept = HostKV.of(SHAPE, Split(attention=frozenset({0, 3}), kv_tokens=1024), 2048)
    assert kept.pieces == tuple(2 if layer in (0, 3) else 4 for layer in range(16))
    assert kept.chunk_bytes == CHUNK
    assert HostKV.of(SHAPE, Split(attention=frozenset(range(16))), 2048).all_bytes == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 300 * CHUNK))
def test_what_is_in_ram_and_what_it_is_read_to_are_within_the_limit(pieces: list[int], ram_bytes: int) -> None:
    host = HostKV(tuple(pieces), CHUNK)
    cold = host.cold_bytes(ram_bytes)
    deepest = -(-cold // CHUNK // len(pieces))  # of some layer at least
    assert 0 <= cold <= sum(pieces) * CHUNK
    assert host.least_bytes <= host.all_bytes
    if ram_bytes >= host.all_bytes:
        assert cold == 0
    elif cold < sum(pieces) * CHUNK:
        least = sum(pieces) * CHUNK - cold + staging_slots(len(pieces), CHUNK, deepest) * CHUNK
        assert least <= ram_bytes


def test_more_ram_is_less_to_read_and_a_step_takes_longer_by_less() -> None:
    split = Split(attention=frozenset(range(8)), kv_tokens=4096)
    lost = [host_lost_seconds(SHAPE, split, Spilling(DRIVE, ram * MIB), CONTEXT, 0.05) for ram in (200, 400, 600, 2000)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] == (0.0, 0.0)
    assert all(later > alone - 0.05 for later, alone in lost)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of a GPU that cannot hold 1 GiB of keys and values beside 1 GiB of weights."""
    return planned(GIB + 256 * MIB, 256 * MIB)


def test_a_limit_for_ram_is_kept_to(plan: Plan) -> None:
    assert plan.settings.loop == "hybrid"
    kept = plan.settings.kv_ram_bytes
    assert kept is not None
    assert kept <= 256 * MIB
    assert plan.needs.ram.kv_bytes == kept
    in_ram = sum(one.num_bytes for one in plan.placements if one.kind is UnitKind.KV and one.device.value == "cpu")
    assert 0 <= in_ram <= kept
    assert any("of what the GPU does not hold" in note and "on flash" in note for note in plan.notes)
    assert any("with the context full" in note for note in plan.notes)
    assert plan.needs.gpu.needed_bytes <= plan.budget.gpu_bytes


def test_what_a_plan_has_on_flash(plan: Plan) -> None:
    chosen = plan.settings
    split = split_of(SHAPE, plan.placements, chosen.gpu_slots, chosen.gpu_kv_tokens)
    host = HostKV.of(SHAPE, split, CONTEXT)
    assert chosen.kv_ram_bytes is not None
    assert flash_kv_bytes(SHAPE, plan) == host.cold_bytes(chosen.kv_ram_bytes) > 0
    whole = planned(8 * GIB, 256 * MIB)
    assert flash_kv_bytes(SHAPE, whole) == 0


def test_the_plan_survives_its_file_and_is_runnable(plan: Plan) -> None:
    assert check_runnable(Plan.from_json(plan.to_json()), MODEL) == plan
    less = replace(plan, settings=replace(plan.settings, kv_ram_bytes=CHUNK))
    with pytest.raises(PlanError, match=r"num_bytes|context need at least"):
        check_runnable(less, MODEL)


def test_reading_takes_its_time_in_the_prediction(plan: Plan) -> None:
    options = {"prompt_tokens": CONTEXT - 200}
    slow, fast = (
        planned(GIB + 256 * MIB, 256 * MIB, drive, **options) for drive in (replace(DRIVE, bytes_per_s=3e8), DRIVE)
    )
    roomy = planned(GIB + 256 * MIB, 4 * GIB, **options)
    speeds = [one.predicted.decode_tokens_per_s for one in (slow, fast, roomy)]
    assert speeds == sorted(speeds)
    assert speeds[0] < 0.8 * speeds[2]
    assert slow.predicted.bottleneck is Bottleneck.FLASH


def test_a_gpu_that_holds_all_needs_no_ram_for_it() -> None:
    plan = planned(8 * GIB, 256 * MIB)
    assert plan.settings.kv_ram_bytes is None
    assert plan.needs.ram.kv_bytes == 0


def test_what_fits_neither_memory_goes_to_flash() -> None:
    """Without a word about RAM: all that is free is for keys and values."""
    plan = solve(question(PROCESS + GIB, 2 * GIB, context_tokens=1 << 17))
    assert plan.settings.loop == "hybrid"
    assert plan.settings.kv_ram_bytes is not None
    assert plan.needs.ram.needed_bytes <= plan.budget.ram_bytes
    assert check_runnable(Plan.from_json(plan.to_json()), MODEL) == plan


def test_too_little_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--kv-ram 4.0 MiB is too little"):
        planned(GIB + 256 * MIB, 4 * MIB)
