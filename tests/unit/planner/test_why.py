"""Every option of a unit is there, with what speaks against it."""

import pytest

from offload.errors import RequestError
from offload.tiers import Device, Tier
from planner.budget import GIB, Budget
from planner.machine import Machine
from planner.question import Here, Question, Wish, ask
from planner.solve import solve
from planner.why import Choice, why
from tests.support.machines import budget_of, machine
from tests.support.planning import header, llama_8b, profile


def asked(on: Machine) -> Question:
    return ask(llama_8b(), budget_of(on), on, Wish(context_tokens=512))  # type: ignore[arg-type]


def by_place(choices: tuple[Choice, ...]) -> dict[tuple[Tier, Device], Choice]:
    return {(one.tier, one.device): one for one in choices}


def test_all_options_and_one_taken() -> None:
    question = asked(machine(ram_bytes=16 * GIB, gpu_bytes=2 * GIB))
    choices = by_place(why(question, solve(question), "blk.31.dense_ffn"))
    assert {(Tier.RAM, Device.CPU), (Tier.RAM, Device.GPU), (Tier.GPU, Device.GPU)} <= choices.keys()
    assert [one.taken for one in choices.values()].count(True) == 1
    assert choices[Tier.RAM, Device.CPU].compute_s > choices[Tier.GPU, Device.GPU].compute_s > 0
    assert choices[Tier.RAM, Device.GPU].load_s > 0
    assert all(one.reason for one in choices.values())


def test_too_large_and_too_slow_are_said() -> None:
    question = asked(machine(ram_bytes=4 * GIB))
    plan = solve(question)
    on_flash = next(p for p in plan.placements if p.tier is Tier.FLASH)
    choices = by_place(why(question, plan, on_flash.unit))
    assert "too much for the RAM" in choices[Tier.RAM, Device.CPU].reason


def test_slower_options_are_said() -> None:
    question = asked(machine(ram_bytes=16 * GIB, gpu_bytes=8 * GIB))
    choices = by_place(why(question, solve(question), "blk.0.dense_ffn"))
    assert "longer" in choices[Tier.RAM, Device.CPU].reason


def test_all_classes_of_a_layers_experts() -> None:
    on = machine(ram_bytes=8 * GIB)
    model = header(layers=8, width=1024, heads=8, ffn=1024, experts=32, used=2, weights="Q8_0")
    question = ask(model, budget_of(on), on, Wish(context_tokens=512))  # type: ignore[arg-type]
    choices = why(question, solve(question), "blk.3.experts")
    assert choices
    assert all(one.unit.partition("#")[0] == "blk.3.experts" for one in choices)


def test_unknown_units_are_refused() -> None:
    question = asked(machine())
    with pytest.raises(RequestError, match=r"no unit 'blk\.99\.experts'") as caught:
        why(question, solve(question), "blk.99.experts")
    assert "blk.0.attention" in (caught.value.hint or "")


def test_of_this_machine_what_is_not_executed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    on = machine(ram_bytes=16 * GIB, gpu_bytes=8 * GIB)
    monkeypatch.setattr("planner.why.machine_of", lambda _: on)
    question = ask(llama_8b(), Budget(16 * GIB, 8 * GIB, "test", "a GPU"), Here(profile()), Wish())  # type: ignore[arg-type]
    choices = by_place(why(question, solve(question), "blk.0.dense_ffn"))
    assert choices[Tier.RAM, Device.CPU].taken
    reasons = {one.reason for one in why(question, solve(question), "output")}
    assert "taken" in reasons
    assert any("does not execute it yet" in reason for reason in reasons)
