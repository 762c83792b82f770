"""Hybrid plans that leave a part of the GPU layers' keys and values in RAM: when, how much, and what that costs."""

from dataclasses import replace

import pytest

from offload.errors import PlanError
from offload.tiers import Device, Tier
from planner.budget import GIB, Budget
from planner.gpu_choice import chosen_gpu
from planner.hybrid import fit_hybrid
from planner.hybrid_memory import kv_limits, kv_tokens, ram_kv_tokens
from planner.hybrid_parts import StepCosts, parts
from planner.model_shape import UnitKind
from planner.plan import Plan
from planner.plan_check import check_runnable
from planner.prediction import Bottleneck
from planner.question import Here, Question, Wish, ask
from planner.solve import solve
from planner.spread import machine_of
from tests.support.planning import olmoe, profile

CONTEXT = 16384


def question(vram: str, context: int = CONTEXT) -> Question:
    gpu = chosen_gpu(f"sim:vram={vram},bw=192GB/s,link=6GB/s,tflops=6")
    assert gpu is not None
    budget = Budget(64 * GIB, gpu.free_bytes, "test", gpu.name)
    return ask(olmoe(), budget, Here(profile(), gpu), Wish(context, threads=4))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of a GPU that cannot hold 2 GiB of keys and values."""
    return solve(question("2GiB"))


def test_layers_stay_on_the_gpu_with_a_part_of_their_cache(plan: Plan) -> None:
    kept = plan.settings.gpu_kv_tokens
    assert plan.settings.loop == "hybrid"
    assert kept is not None
    assert kept % 512 == 0
    cached = [placement for placement in plan.placements if placement.kind is UnitKind.KV]
    assert sum(placement.tier is Tier.GPU for placement in cached) > 12
    token_bytes = 2 * 2 * 2048
    assert all(one.num_bytes == token_bytes * (kept if one.tier is Tier.GPU else CONTEXT) for one in cached)
    assert plan.needs.gpu.needed_bytes <= plan.budget.gpu_bytes
    assert plan.needs.ram.kv_bytes >= sum(token_bytes * (CONTEXT - kept) for one in cached if one.tier is Tier.GPU)
    assert any(f"newest {kept} of {CONTEXT} tokens" in note for note in plan.notes)


def test_only_where_the_gpu_cannot_hold_all(plan: Plan) -> None:
    asked = question("2GiB")
    whole = fit_hybrid(asked, machine_of(asked), plan.settings.device, threads=4, context_tokens=CONTEXT)
    assert whole is not None
    assert whole.gpu_kv_tokens is None
    assert any(one.device is Device.CPU for one in whole.placements if one.kind is UnitKind.KV)
    short = solve(question("2GiB", 2048))
    assert short.settings.gpu_kv_tokens is None


def test_the_plan_survives_its_file_and_is_runnable(plan: Plan) -> None:
    assert check_runnable(Plan.from_json(plan.to_json()), olmoe()) == plan  # type: ignore[arg-type]
    for wrong, message in ((0, "must be at least 1"), (512, "num_bytes|needs")):
        changed = replace(plan, settings=replace(plan.settings, gpu_kv_tokens=wrong))
        with pytest.raises(PlanError, match=message):
            check_runnable(Plan.from_json(changed.to_json()), olmoe())  # type: ignore[arg-type]


def test_limits_hold_a_chunk_and_the_piece_it_begins_in() -> None:
    assert list(kv_limits(16384, 512)) == [12288, 8192, 4096, 2048]
    assert list(kv_limits(4096, 512)) == [3072, 2048, 1024]
    assert list(kv_limits(1024, 256)) == []
    assert kv_tokens(16384, 4096) == 4096
    assert ram_kv_tokens(16384, None) == 0
    assert ram_kv_tokens(5000, 4096) == 1024


def test_a_step_counts_the_longer_of_both_parts_and_what_crosses() -> None:
    asked = question("2GiB")
    machine = machine_of(asked)
    attention = next(part for part in parts(asked.shape) if part.kind is UnitKind.ATTENTION)

    def terms(depth: int, kept: int | None) -> dict[Bottleneck, float]:
        return dict(StepCosts(asked.shape, machine, 4, 1, depth, kv_tokens=kept).part(attention, Device.GPU))

    whole, near, half, few = terms(8000, None), terms(4000, 4096), terms(8000, 4096), terms(8000, 1024)
    assert Bottleneck.LINK not in whole
    assert near == terms(4000, None)
    assert machine.gpu is not None
    assert half[Bottleneck.LINK] > 2 * machine.gpu.handover_s
    assert sum(few.values()) > sum(half.values()) > sum(whole.values())
    assert few[Bottleneck.RAM_BANDWIDTH] > half[Bottleneck.RAM_BANDWIDTH] > 0
