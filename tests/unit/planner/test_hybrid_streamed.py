"""Hybrid plans of models whose experts exceed both memories: within both, runnable, and quicker with more of either."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from offload.errors import PlanError
from offload.expert_rates import DeviceTime, ExpertTimes
from offload.expert_schedule import schedule_experts
from offload.flash_probe import DriveFigures, ReadFigure, filesystem_key
from offload.gguf import GGUFFile
from offload.tiers import Device, Tier
from planner.budget import GIB, MIB, Budget
from planner.hybrid_flash import FlashExperts
from planner.hybrid_rates import expert_rates, moved_share
from planner.hybrid_split import Split, split_of
from planner.hybrid_step import HybridRun
from planner.hybrid_streamed import fit_streamed_hybrid
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Plan
from planner.plan_check import check_runnable
from planner.profile import Profile
from planner.question import Here, Question, Wish, ask
from planner.schedule import schedule
from planner.simulate import simulate
from planner.solve import solve
from planner.spread import machine_of
from planner.streamed import all_slots, hit_curve, slot_bytes
from planner.why import why
from tests.support.planning import GPU, RATES, olmoe, profile

MODEL = cast(GGUFFile, olmoe())
SHAPE = ModelShape.from_gguf(MODEL)
PROCESS = 3 * GIB + 500 * MIB  # of RAM with a real GPU


def known(bytes_per_s: float = 2e9) -> Profile:
    """A machine with a GPU and a drive that were measured."""
    drive = DriveFigures((ReadFigure(1 << 20, 4, True, bytes_per_s),), 1e9)
    return replace(profile(), gpu=RATES, drives={filesystem_key(Path(MODEL.path)): drive})


def question(ram_bytes: int, gpu_bytes: int, bytes_per_s: float = 2e9, **wish: object) -> Question:
    budget = Budget(ram_bytes, gpu_bytes, "test", "a GPU")
    options = {"context_tokens": 1024, "threads": 4, "loop": "hybrid", **wish}
    return ask(MODEL, budget, Here(known(bytes_per_s), GPU), Wish(**options))  # type: ignore[arg-type]


def planned(ram_bytes: int, gpu_bytes: int, bytes_per_s: float = 2e9, **wish: object) -> Plan:
    return solve(question(ram_bytes, gpu_bytes, bytes_per_s, **wish))


def test_a_model_larger_than_both_memories() -> None:
    plan = planned(PROCESS + GIB, 3 * GIB)
    assert plan.settings.loop == "hybrid"
    assert 0 < plan.settings.stream_slots < all_slots(SHAPE)
    assert plan.settings.gpu_slots > 0
    assert plan.settings.stream_slots + plan.settings.gpu_slots < all_slots(SHAPE)
    assert plan.needs.ram.needed_bytes <= plan.budget.ram_bytes
    assert plan.needs.gpu.needed_bytes <= plan.budget.gpu_bytes
    assert plan.needs.ram.slots_bytes == plan.settings.stream_slots * slot_bytes(SHAPE)
    assert plan.needs.gpu.slots_bytes > GIB
    assert plan.needs.ram.weights_bytes < SHAPE.num_bytes // 4
    experts = {(p.tier, p.device) for p in plan.placements if p.kind is UnitKind.EXPERTS}
    assert experts == {(Tier.FLASH, Device.CPU)}
    assert check_runnable(Plan.from_json(plan.to_json()), MODEL) == plan
    assert any("read from flash" in note for note in plan.notes)
    assert any(choice.tier is Tier.GPU for choice in why(question(PROCESS + GIB, 3 * GIB), plan, "blk.3.experts"))


def test_a_gpu_may_have_the_newest_keys_and_values_alone() -> None:
    asked = question(PROCESS + 2 * GIB, 3 * GIB, context_tokens=16384)
    options = {"threads": 4, "context_tokens": 16384, "gpu_kv_tokens": 2048}
    fit = fit_streamed_hybrid(asked, machine_of(asked), "cuda:0", **options)  # type: ignore[arg-type]
    assert fit is not None
    assert fit.stream_slots > 0
    assert fit.gpu_kv_tokens == 2048
    cached = [one for one in fit.placements if one.kind is UnitKind.KV and one.device is Device.GPU]
    assert cached
    assert all(8 * one.num_bytes == SHAPE.kv_bytes_per_layer[0] * 16384 for one in cached)
    assert fit.needs.ram.kv_bytes >= sum(7 * one.num_bytes for one in cached)


def test_what_ram_holds_is_not_read() -> None:
    plan = planned(PROCESS + 5 * GIB, 2 * GIB)
    assert plan.settings.stream_slots == 0
    assert not any(placement.tier is Tier.FLASH for placement in plan.placements)


@pytest.mark.parametrize("what", ["ram", "gpu", "drive"])
def test_more_of_anything_is_quicker(what: str) -> None:
    steps = {
        "ram": [(PROCESS + size * GIB // 2, 2 * GIB, 2e9) for size in (1, 2, 3)],
        "gpu": [(PROCESS + GIB, size * GIB, 2e9) for size in (2, 3, 4)],
        "drive": [(PROCESS + GIB, 2 * GIB, rate) for rate in (1e9, 2e9, 4e9)],
    }[what]
    speeds = [planned(*step).predicted.decode_tokens_per_s for step in steps]
    assert speeds == sorted(speeds)
    assert speeds[-1] > 1.2 * speeds[0]


def test_the_caches_add_up() -> None:
    every = frozenset(range(16))
    flash = FlashExperts(256, hit_curve(SHAPE), 1e9)
    alone = flash.lacking(SHAPE, Split(every, frozenset(), True, frozenset(), 0), 3, 1)
    beside = flash.lacking(SHAPE, Split(every, every, True, frozenset(), 512), 3, 1)
    assert alone == pytest.approx(1 - hit_curve(SHAPE).hit_rate(256))
    assert beside == pytest.approx(1 - hit_curve(SHAPE).hit_rate(768))
    assert flash.lacking(SHAPE, Split(every, every, True, frozenset({3}), 64), 3, 1) == 0.0
    assert flash.lacking(SHAPE, Split(every, every, True, frozenset(), 768), 3, 1) == pytest.approx(0.0)


def test_what_is_lacking_takes_the_drives_time() -> None:
    asked = question(PROCESS + GIB, 3 * GIB)
    every = frozenset(range(16))
    split, curve = Split(every, every, True, frozenset(), 256), hit_curve(SHAPE)

    def seconds(flash: FlashExperts | None) -> float:
        run = HybridRun(SHAPE, machine_of(asked), 4, split, curve, flash=flash)
        return simulate(schedule(*run.step(tokens=1, depth=100))).seconds

    flash = FlashExperts(256, curve, 1e9)
    lacking = flash.lacking(SHAPE, split, 0, 1)
    experts = sum(unit.active_bytes for unit in SHAPE.units if unit.kind is UnitKind.EXPERTS)
    read_s = lacking * experts / 1e9
    assert seconds(None) + 0.7 * read_s < seconds(flash) < seconds(None) + 1.1 * read_s
    assert seconds(replace(flash, bytes_per_s=1e12)) == pytest.approx(seconds(None), rel=0.05)


def test_experts_are_brought_from_flash_for_many_tokens_alone() -> None:
    machine = machine_of(question(PROCESS + GIB, 3 * GIB))
    unit = next(unit for unit in SHAPE.units if unit.kind is UnitKind.EXPERTS)
    rates = expert_rates(SHAPE, machine, 1, streams=True)
    assert rates is not None
    assert rates.read_bytes_per_s is not None
    options = {"hits": 0.2, "places": 64, "lacking": 0.5}
    assert moved_share(SHAPE, rates, unit, tokens=1, **options) == 0.0
    assert moved_share(SHAPE, rates, unit, tokens=512, **options) > 0.2


def test_experts_in_ram_stay_with_the_cpu() -> None:
    """A copy to the GPU is read from flash, whether RAM has the expert or not."""
    times = ExpertTimes(DeviceTime(1e-4, 0, 0), DeviceTime(0, 0, 1e-3), 1e-4, read_s=1e-3)
    split = schedule_experts([1, 1, 4, 4], [False] * 4, times, [True, True, False, False])
    assert set(split.cpu) >= {0, 1}
    assert set(split.moved) == {2, 3}
    assert split.makespan_s == pytest.approx(2.1e-3)


def test_settings_that_contradict_the_placements() -> None:
    plan = planned(PROCESS + GIB, 3 * GIB)
    with pytest.raises(PlanError, match="flash and computed on cpu; with 0 slots"):
        check_runnable(replace(plan, settings=replace(plan.settings, stream_slots=0)), MODEL)
    more = replace(plan.settings, stream_slots=plan.settings.stream_slots + 50)
    with pytest.raises(PlanError, match=r"needs\.ram adds up"):
        check_runnable(replace(plan, settings=more), MODEL)
    assert split_of(SHAPE, plan.placements, plan.settings.gpu_slots).slots == plan.settings.gpu_slots
