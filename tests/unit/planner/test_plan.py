"""Plans as documents: read back equal, or refused with the place of the fault."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import PlanError
from planner.budget import GIB, Budget
from planner.plan import MemoryNeeds, Plan
from planner.prediction import Measurement
from planner.solve import make_plan
from tests.support.planning import header, profile


@pytest.fixture
def plan() -> Plan:
    return make_plan(header(experts=4, used=2), budget=Budget(GIB, 0, "test", "no GPU"), profile=profile())


def test_round_trip(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_json() == Plan.from_json(plan.to_json()).to_json()


def test_keys_that_others_rely_on(plan: Plan) -> None:
    predicted = json.loads(plan.to_json())["predicted"]
    keys = {"decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "peak_ram_bytes"}
    assert keys | {"bottleneck"} <= predicted.keys()
    assert predicted == plan.predicted.as_dict()
    measured = Measurement(10.0, None, 0.5, 1000)
    assert keys <= measured.as_dict().keys()
    assert measured.as_dict()["prefill_tokens_per_s"] is None


def test_needs_add_up() -> None:
    needs = MemoryNeeds(1, 2, 4, 8, 16, 32, 64, 128)
    assert (needs.needed_bytes, needs.peak_bytes) == (255, 127)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 99, "format 99"),
        (("version",), "1", "version must be a whole number"),
        (("placements", 0, "tier"), "moon", r"placements\[0\]\.tier must be one of gpu, ram, flash"),
        (("placements", 0, "num_bytes"), -1, "negative"),
        (("placements", 0, "num_bytes"), 1 << 50, "are placed in ram, more than needs.ram"),
        (("placements", 1, "unit"), "embedding", "placed twice"),
        (("settings", "threads"), 0, "settings.threads is 0"),
        (("settings", "threads"), True, "settings.threads must be a whole number, not true or false"),
        (("settings", "context_tokens"), None, "settings.context_tokens must be a whole number, not null"),
        (("budget", "ram_bytes"), 1000, "its budget is 1000"),
        (("predicted", "ttft_s"), "soon", "predicted.ttft_s must be a number"),
        (("notes",), "none", "notes must be an array"),
        (("model",), [], "model must be an object, not an array"),
        (("surprise",), 1, "unknown key surprise"),
        (("settings", "surprise"), 1, "unknown key settings.surprise"),
    ],
)
def test_wrong_documents_are_refused_with_the_place(
    plan: Plan, path: tuple[Any, ...], value: Any, message: str
) -> None:
    document = json.loads(plan.to_json())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": NaN}', "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(text)


def test_missing_keys_are_named(plan: Plan) -> None:
    document = json.loads(plan.to_json())
    del document["predicted"]["bottleneck"]
    with pytest.raises(PlanError, match=r"predicted\.bottleneck is missing"):
        Plan.from_json(json.dumps(document))


@given(st.data())
def test_a_cut_document_is_refused(data: st.DataObject) -> None:
    whole = make_plan(header(layers=1), budget=Budget(GIB, 0, "test", "no GPU"), profile=profile()).to_json()
    with pytest.raises(PlanError):
        Plan.from_json(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_a_plan_is_for_one_model(plan: Plan) -> None:
    assert plan.checked_for(header(experts=4, used=2)) is plan
    other = header(experts=8, used=2)
    other.path = Path("other.gguf")
    with pytest.raises(PlanError, match=r"test\.gguf.*not for other\.gguf"):
        plan.checked_for(other)
