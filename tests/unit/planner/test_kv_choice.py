"""Types of the KV cache that the planner chooses: float16 while it fits, then less, said in the plan; refusals."""

from dataclasses import replace

import pytest

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import DoesNotFitError
from planner.budget import MIB, Budget
from planner.kv_costs import kv_costs
from planner.question import Here, Question, Wish, ask
from planner.solve import solve, solve_or_explain
from tests.support.planning import header, profile

MODEL = header(layers=4, heads=4, kv_heads=4)  # heads of 64
CONTEXT = 32768


def question(ram_mib: float, *, is_free: bool = True, kv: KVPolicy | None = None, loop: str = "auto") -> Question:
    wish = Wish(CONTEXT, 2, loop=loop, kv=kv or KVPolicy(), kv_is_free=is_free)
    return ask(MODEL, Budget(int(ram_mib * MIB), 0, "--budget", "no GPU"), Here(profile()), wish)  # type: ignore[arg-type]


def least_mib(kind: KVType) -> float:
    """RAM that a plan with these types needs."""
    plan = solve(question(1 << 20, is_free=False, kv=KVPolicy(kind, kind)))
    return plan.needs.ram.needed_bytes / MIB


def test_float16_stays_as_long_as_it_fits() -> None:
    plan = solve(question(1 << 20))
    assert plan.settings.kv.is_plain
    assert not any("keys and values" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("larger", "kind"), [(KVType.F16, KVType.Q8_0), (KVType.Q8_0, KVType.KIVI4)], ids=["q8_0", "kivi4"]
)
def test_less_is_taken_where_it_does_not(larger: KVType, kind: KVType) -> None:
    room = least_mib(kind) + 1
    assert room < least_mib(larger)
    plan = solve(question(room, loop="program"))
    assert plan.settings.kv == KVPolicy(kind, kind) or plan.settings.kv_ram_bytes is not None
    if plan.settings.kv_ram_bytes is None:
        assert any(f"keys and values are kept as {kind}" in note for note in plan.notes)
    assert solve(question(room, loop="program")) == plan


def test_a_refusal_names_what_would_fit() -> None:
    asked = question(least_mib(KVType.Q8_0) + 1, is_free=False)
    with pytest.raises(DoesNotFitError) as refused:
        solve_or_explain(replace(asked, wish=replace(asked.wish, loop="sequential")))
    assert "-ctk" not in (refused.value.hint or ""), "the loop cannot keep them"
    with pytest.raises(DoesNotFitError, match="keys and values as"):
        solve(question(64))


def test_the_shape_follows_the_types() -> None:
    plain = question(1 << 20)
    coded = plain.with_kv(KVPolicy(KVType.Q8_0, KVType.Q8_0))
    assert coded.shape.kv_bytes_per_token * 32 == plain.shape.kv_bytes_per_token * 17
    assert coded.with_kv(KVPolicy()).shape == plain.shape
    assert not coded.wish.kv_is_free


def test_what_contexts_cost() -> None:
    asked = question(1 << 20)
    asked = replace(asked, shape=replace(asked.shape, context_length=CONTEXT))
    costs = kv_costs(asked, solve(asked))
    assert [(cost.context_tokens, cost.kind) for cost in costs] == [
        (tokens, kind) for tokens in (4096, 16384) for kind in ("f16", "q8_0", "kivi4")
    ]
    sizes = {cost.kind: cost.num_bytes for cost in costs if cost.context_tokens == 16384}
    assert sizes["f16"] == 4 * costs[0].num_bytes == 16384 * asked.shape.kv_bytes_per_token
    assert sizes["q8_0"] * 32 == sizes["f16"] * 17
    speeds = [cost.decode_tokens_per_s or 0.0 for cost in costs]
    assert speeds[0] > speeds[3] > 0, "a full context of 16384 takes longer than one of 4096"
    assert speeds[4] > speeds[3], "and less with fewer bytes"
    assert {cost.budget_tokens for cost in costs} == {2048}
    assert (costs[3].budget_tokens_per_s or 0.0) > speeds[3], "what is not read takes no time"
    assert not any(cost.flash_bytes for cost in costs)
    short = kv_costs(question(64), solve(asked))
    assert all(cost.decode_tokens_per_s is cost.budget_tokens_per_s is None for cost in short)


def test_contexts_beyond_ram_cost_reads() -> None:
    asked = question(least_mib(KVType.F16) + 96, kv=KVPolicy(budget_tokens=512), loop="program")
    asked = replace(asked, shape=replace(asked.shape, context_length=131072))
    costs = {(cost.context_tokens, cost.kind): cost for cost in kv_costs(asked, solve(asked))}
    short, long = costs[4096, KVType.F16], costs[131072, KVType.F16]
    assert not short.flash_bytes
    assert 0 < long.flash_bytes < long.num_bytes
    assert (long.decode_tokens_per_s or 0.0) < (short.decode_tokens_per_s or 0.0) / 8
    assert long.budget_tokens == 512
    assert long.budget_tokens_per_s


def test_what_spills_has_room_on_the_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = question(640)
    asked = replace(asked, wish=replace(asked.wish, context_tokens=1 << 19))
    plan = solve(asked)
    assert plan.settings.kv.is_plain, "the first that spills"
    assert plan.settings.kv_ram_bytes is not None
    needed = asked.shape.kv_bytes_per_token << 19
    monkeypatch.setattr("planner.kv_choice.spill_room", lambda: needed * 2 // 5)
    plan = solve(asked)
    assert plan.settings.kv.key is KVType.KIVI4
    assert any("keys and values are kept as kivi4" in note for note in plan.notes)
    monkeypatch.setattr("planner.kv_choice.spill_room", lambda: 0)
    assert solve(asked).settings.kv.is_plain, "no type has room there"
