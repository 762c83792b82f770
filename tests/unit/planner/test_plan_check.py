"""Plans edited by hand: each refusal names the field, what is wrong, and what would be right."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from offload.errors import PlanError
from planner.budget import GIB, Budget
from planner.plan import Plan
from planner.plan_check import check_runnable
from planner.solve import make_plan
from tests.support.planning import HeaderOnly, header, profile


@pytest.fixture
def model() -> HeaderOnly:
    return header(experts=4, used=2)


@pytest.fixture
def plan(model: HeaderOnly) -> Plan:
    return make_plan(model, budget=Budget(GIB, 0, "test", "no GPU"), profile=profile())


def edited(plan: Plan, change: Callable[[dict[str, Any]], None]) -> Plan:
    document = json.loads(plan.to_json())
    change(document)
    return Plan.from_json(json.dumps(document))


def test_a_plan_of_this_version_is_runnable(model: HeaderOnly, plan: Plan) -> None:
    assert check_runnable(Plan.from_json(plan.to_json()), model) == plan
    slow = make_plan(model, budget=Budget(GIB, 0, "test", "no GPU"), profile=profile(), loop="sequential")
    assert check_runnable(slow, model) is slow


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("machine", "here"), False, "simulated, and cannot be run"),
        (("settings", "loop"), "fastest", "settings.loop is 'fastest'; it must be one of hybrid, sequential, program"),
        (("settings", "loop"), "simulated", "settings.loop is 'simulated'"),
        (("settings", "device"), "cuda:0", "settings.device is 'cuda:0'; the program loop runs on cpu"),
        (("settings", "weights_form"), "float32", "weights_form is float32; the program loop on cpu takes packed"),
        (
            ("placements", 2, "tier"),
            "flash",
            r"\[2\]: blk\.0\.kv is put in flash.*holds it in ram",
        ),
        (("placements", 2, "device"), "gpu", r"placements\[2\]: blk\.0\.kv.*computed on gpu"),
        (
            ("placements", 1, "unit"),
            "blk.9.attention",
            r"\[1\]\.unit: the model has no unit 'blk\.9\.attention'",
        ),
        (("placements", 1, "num_bytes"), 7, r"placements\[1\]\.num_bytes of blk\.0\.attention is 7; .* it is \d+"),
        (("settings", "context_tokens"), 8192, r"8192 tokens of context it is \d+"),
        (("needs", "ram", "activations_bytes"), 0, r"needs\.ram adds up to"),
    ],
)
def test_edits_that_cannot_be_run(
    model: HeaderOnly, plan: Plan, path: tuple[Any, ...], value: Any, message: str
) -> None:
    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    with pytest.raises(PlanError, match=message):
        check_runnable(edited(plan, change), model)


def test_a_missing_unit_is_named(model: HeaderOnly, plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"placements: blk\.0\.attention is missing"):
        check_runnable(edited(plan, lambda document: document["placements"].pop(1)), model)


def test_what_the_gpu_holds_the_gpu_computes(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"placements\[0\]\.device is cpu"):
        edited(plan, lambda document: document["placements"][0].update(tier="gpu"))


def test_other_kv_types_are_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"settings\.cache_type_k"):
        edited(plan, lambda document: document["settings"].update(cache_type_k="q9_0"))
    with pytest.raises(PlanError, match=r"settings\.cache_type_v is 'kivi2'; the hybrid loop keeps f16"):
        edited(plan, lambda document: document["settings"].update(cache_type_v="kivi2", loop="hybrid"))


def test_threads_may_be_edited(model: HeaderOnly, plan: Plan) -> None:
    more = edited(plan, lambda document: document["settings"].update(threads=3))
    assert check_runnable(more, model).settings.threads == 3
