"""Hybrid plans edited by hand: each refusal names the field, what is wrong, and what would be right."""

import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from offload.errors import PlanError, RequestError
from offload.gguf import GGUFFile
from planner.budget import GIB, Budget
from planner.gpu_choice import EXAMPLE, chosen_gpu
from planner.plan import Plan
from planner.plan_check import check_runnable
from planner.question import Here, Wish, ask
from planner.solve import solve
from tests.support.planning import header, profile

MODEL = cast(
    GGUFFile,
    header(layers=4, width=1024, heads=8, ffn=1024, experts=32, used=4, shared=True, vocab=32000, weights="Q8_0"),
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """All parts but the embedding on a GPU whose slots hold some of the experts."""
    question = ask(
        MODEL, Budget(8 * GIB, GIB // 4, "test", "a GPU"), Here(profile(), chosen_gpu(EXAMPLE)), Wish(256, 4)
    )
    made = solve(question)
    assert made.settings.loop == "hybrid"
    assert 0 < made.settings.gpu_slots < 4 * 32
    return made


def edited(plan: Plan, change: Callable[[dict[str, Any]], None]) -> Plan:
    document = json.loads(plan.to_json())
    change(document)
    return Plan.from_json(json.dumps(document))


def place(plan: Plan, unit: str, tier: str, device: str) -> Plan:
    def change(document: dict[str, Any]) -> None:
        entry = next(entry for entry in document["placements"] if entry["unit"] == unit)
        for memory in ("ram", "gpu"):  # what is placed there is accounted for, so that this is not what is wrong
            document["needs"][memory]["weights_bytes"] += entry["num_bytes"]
            document["budget"][f"{memory}_bytes"] += entry["num_bytes"]
        entry["tier"], entry["device"] = tier, device

    return edited(plan, change)


def test_as_planned(plan: Plan) -> None:
    assert check_runnable(Plan.from_json(plan.to_json()), MODEL) == plan


@pytest.mark.parametrize(
    ("unit", "tier", "device", "message"),
    [
        ("blk.1.attention", "flash", "cpu", r"blk\.1\.attention is put in flash .* in gpu on gpu, or in ram on cpu"),
        ("blk.1.kv", "ram", "gpu", r"blk\.1\.kv is put in ram and computed on gpu"),
        ("blk.1.kv", "ram", "cpu", r"blk\.1\.kv is computed on cpu and blk\.1\.attention on gpu; .* on one device"),
        ("blk.2.shared_expert", "ram", "cpu", r"blk\.2\.shared_expert is computed on cpu and blk\.2\.router on gpu"),
        ("embedding", "gpu", "gpu", r"embedding is computed on gpu; the hybrid loop computes it on cpu"),
    ],
)
def test_placements_that_cannot_be_run(plan: Plan, unit: str, tier: str, device: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_runnable(place(plan, unit, tier, device), MODEL)


def test_experts_are_where_their_router_is(plan: Plan) -> None:
    changed = plan
    for unit in ("blk.0.router", "blk.0.shared_expert"):
        changed = place(changed, unit, "ram", "cpu")
    changed = place(changed, "blk.0.experts", "gpu", "gpu")
    with pytest.raises(PlanError, match=r"blk\.0\.experts is computed on gpu, and the layer's router on cpu"):
        check_runnable(changed, MODEL)


@pytest.mark.parametrize("slots", [4 * 32 + 1, 10**9])
def test_slots_that_nothing_needs(plan: Plan, slots: int) -> None:
    with pytest.raises(PlanError, match=rf"settings\.gpu_slots is {slots}; .* it must be from 0 to 128"):
        check_runnable(edited(plan, lambda document: document["settings"].update(gpu_slots=slots)), MODEL)


def test_more_slots_than_memory(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"needs\.(ram|gpu) adds up to"):
        check_runnable(edited(plan, lambda document: document["settings"].update(gpu_slots=4 * 32)), MODEL)


def test_slots_below_zero_and_in_other_loops(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"gpu_slots is -1; it must be at least 0"):
        edited(plan, lambda document: document["settings"].update(gpu_slots=-1))
    alone = solve(ask(MODEL, Budget(8 * GIB, 0, "test", "no GPU"), Here(profile()), Wish(256, 4)))
    with pytest.raises(PlanError, match="the program loop has none"):
        check_runnable(edited(alone, lambda document: document["settings"].update(gpu_slots=3)), MODEL)


def test_nothing_on_the_gpu(plan: Plan) -> None:
    def change(document: dict[str, Any]) -> None:
        for entry in document["placements"]:
            entry["tier"], entry["device"] = "ram", "cpu"
        document["settings"]["gpu_slots"] = 0
        document["needs"]["ram"]["weights_bytes"] += GIB
        document["budget"]["ram_bytes"] += GIB

    with pytest.raises(PlanError, match="nothing is computed on gpu"):
        check_runnable(edited(plan, change), MODEL)


def test_bytes_are_those_of_the_device(plan: Plan) -> None:
    def change(document: dict[str, Any]) -> None:
        next(entry for entry in document["placements"] if entry["unit"] == "output")["num_bytes"] = 7

    with pytest.raises(PlanError, match=r"num_bytes of output is 7"):
        check_runnable(edited(plan, change), MODEL)


def test_a_description_that_is_none(plan: Plan) -> None:
    with pytest.raises(RequestError, match="simulated GPU 'sim:fast'"):
        check_runnable(edited(plan, lambda document: document["settings"].update(device="sim:fast")), MODEL)


def test_a_chunk_that_was_not_reserved(plan: Plan) -> None:
    def change(document: dict[str, Any]) -> None:
        document["settings"]["prefill_chunk_tokens"] = 100_000
        document["settings"]["context_tokens"] = plan.settings.context_tokens
        document["needs"]["gpu"]["activations_bytes"] //= 2

    with pytest.raises(PlanError, match=r"needs\.(ram|gpu) adds up to"):
        check_runnable(edited(plan, change), MODEL)
