"""Steps of hybrid plans as they will run: experts with slots, those that are brought, and what hits are learned."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from offload.gguf import GGUFFile
from offload.tiers import Device
from planner.budget import GIB, Budget
from planner.cost import record_run
from planner.gpu_choice import EXAMPLE, chosen_gpu
from planner.hybrid_hits import evened_slots, gpu_hit_curve, gpu_hits_key, slots_of_both
from planner.hybrid_parts import launches, part_of, parts
from planner.hybrid_rates import expert_rates, moved_share
from planner.hybrid_split import Split, split_by_names
from planner.hybrid_step import HybridRun
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Plan
from planner.prediction import Measurement
from planner.question import Here, Wish, ask
from planner.schedule import schedule
from planner.simulate import simulate
from planner.solve import solve
from planner.spread import machine_of
from planner.streamed import hit_curve
from tests.support.planning import header, profile

MODEL = cast(GGUFFile, header(layers=4, width=1024, heads=8, ffn=1024, experts=32, used=4, vocab=32000, tied=False))
SHAPE = ModelShape.from_gguf(MODEL)
GPU = chosen_gpu(EXAMPLE)
QUESTION = ask(MODEL, Budget(8 * GIB, GIB // 4, "test", "a GPU"), Here(profile(), GPU), Wish(256, 4))
EVERY = frozenset(range(4))


def run(split: Split, **options: object) -> HybridRun:
    return HybridRun(SHAPE, machine_of(QUESTION), 4, split, **options)  # type: ignore[arg-type]


def seconds(step: HybridRun, tokens: int = 1) -> float:
    return simulate(schedule(*step.step(tokens=tokens, depth=100))).seconds


def test_parts_are_all_units() -> None:
    names = [unit.name for part in parts(SHAPE) for unit in part.units]
    assert sorted(names) == sorted(unit.name for unit in SHAPE.units)
    assert part_of(SHAPE, "blk.2.kv") == "blk.2.attention"
    assert part_of(SHAPE, "nothing") == "nothing"
    assert launches(next(unit for unit in SHAPE.units if unit.kind is UnitKind.ATTENTION)) == 4


def test_more_slots_are_quicker() -> None:
    curve = hit_curve(SHAPE)
    times = [seconds(run(Split(EVERY, EVERY, True, frozenset(), slots), curve=curve)) for slots in (0, 32, 64, 128)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 1.1 * times[-1]


def test_resident_experts_hit_always() -> None:
    step = run(Split(EVERY, EVERY, True, EVERY, 128), curve=hit_curve(SHAPE))
    problem, _ = step.step(tokens=1, depth=0)
    assert not any(item.name.endswith("#others") for item in problem.items)
    assert step.hit_rate(1) == 0.0, "there are no slots that experts share"


def test_hits_of_long_prompts_are_those_of_the_slots() -> None:
    step = run(Split(EVERY, EVERY, True, frozenset(), 32), curve=hit_curve(SHAPE))
    assert step.hit_rate(1) > 0.25
    assert step.hit_rate(1000) == pytest.approx(0.25, abs=0.01)


def test_experts_are_brought_where_that_pays() -> None:
    rates = expert_rates(SHAPE, machine_of(QUESTION), 4)
    assert rates is not None
    unit = next(unit for unit in SHAPE.units if unit.kind is UnitKind.EXPERTS)
    slow_cpu = replace(rates, cpu_bytes_per_s=1e9, cpu_flops_per_s=1e9)
    assert moved_share(SHAPE, slow_cpu, unit, tokens=512, hits=0.2, places=32) > 0.3
    assert moved_share(SHAPE, slow_cpu, unit, tokens=512, hits=0.2, places=4) == pytest.approx(4 / 32)
    slow_link = replace(rates, move_bytes_per_s=1e6)
    assert moved_share(SHAPE, slow_link, unit, tokens=1, hits=0.2, places=32) == 0
    assert moved_share(SHAPE, rates, unit, tokens=512, hits=0.2, places=0) == 0
    split = Split(EVERY, EVERY, True, frozenset(), 32)
    without = seconds(run(split, curve=hit_curve(SHAPE)), 512)
    brought = seconds(run(split, curve=hit_curve(SHAPE), rates=rates, places=32), 512)
    assert brought <= without


def test_without_experts_there_are_no_rates() -> None:
    dense = ModelShape.from_gguf(cast(GGUFFile, header()))
    assert expert_rates(dense, machine_of(QUESTION), 4) is None


def test_seeds_are_those_of_resident_layers_and_then_some_of_each() -> None:
    split = Split(EVERY, EVERY, True, frozenset({1}), 40)
    seeds = split.seeds(SHAPE)
    assert len(seeds) == len(set(seeds)) == 40
    assert [layer for layer, _ in seeds[:32]] == [1] * 32
    assert seeds[32:36] == ((0, 0), (2, 0), (3, 0), (0, 1))
    assert split.cached_layers(SHAPE) == frozenset({0, 2, 3})
    assert split_by_names(SHAPE, ["blk.0.attention", "output"], 0) == Split(frozenset({0}), frozenset(), True)
    assert Split().is_empty
    assert all(Split().device(part) is Device.CPU for part in parts(SHAPE))


def test_hits_are_learned(tmp_path: Path) -> None:
    plan = solve(QUESTION)
    assert plan.settings.gpu_slots
    known = profile()
    path = tmp_path / "profile.json"
    learned = _learned(plan, path, hit_rate=0.9)
    assert dict(learned.hits[gpu_hits_key(plan.model)]) == {evened_slots(plan): 0.9}  # type: ignore[attr-defined]
    told, assumed = (gpu_hit_curve(SHAPE, each, plan.model) for each in (learned, known))  # type: ignore[arg-type]
    assert told.is_traced
    assert not assumed.is_traced
    assert told.hit_rate(evened_slots(plan)) == pytest.approx(0.9)


def test_what_either_memory_held_is_learned_of_streamed_hybrids(tmp_path: Path) -> None:
    plan = solve(QUESTION)
    streamed = replace(plan, settings=replace(plan.settings, stream_slots=20))
    assert slots_of_both(plan) == 0
    learned = _learned(streamed, tmp_path / "profile.json", hit_rate=0.4, found_rate=0.7)
    slots = slots_of_both(streamed)
    assert slots == plan.settings.gpu_slots + 20
    assert dict(learned.hits[plan.model.key]) == {slots: 0.7}  # type: ignore[attr-defined]
    assert dict(learned.hits[gpu_hits_key(plan.model)]) == {evened_slots(plan): 0.4}  # type: ignore[attr-defined]


def _learned(plan: Plan, path: Path, **rates: float) -> object:
    measured = Measurement(100.0, None, None, 1 << 20, **rates)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.cost.load_or_measure", lambda _path: profile())
        return record_run(plan, measured, path)
