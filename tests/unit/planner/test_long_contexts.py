"""A context of 131072 tokens in the RAM of a laptop: planned within it, predicted, and told what lies on flash."""

from dataclasses import replace
from pathlib import Path

import pytest

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.flash_probe import STREAMING_POINTS
from offload.tiers import Tier
from planner.budget import GIB, Budget
from planner.folders import spill_folder
from planner.kv_spill import cold_bytes, least_kv_ram_bytes
from planner.machine_files import load_machine
from planner.model_shape import UnitKind
from planner.plan import Plan
from planner.profile import with_drive
from planner.profile_spill import with_spill_rates
from planner.question import Here, Wish, ask
from planner.solve import solve
from tests.support.planning import HeaderOnly, header, profile

CONTEXT = 131072
LLAMA_1B = header(
    layers=16, width=2048, heads=32, kv_heads=8, ffn=8192, vocab=128256, context=CONTEXT, weights="Q4_0"
)  # fmt: skip
LLAMA_7B = header(
    layers=32, width=4096, heads=32, kv_heads=32, ffn=11008, vocab=32000, tied=False, context=4096, weights="Q4_0"
)  # fmt: skip


def planned(model: HeaderOnly, ram_gib: float, kv: KVPolicy | None, prompt: int | None = None) -> Plan:
    known = with_spill_rates(with_drive(profile(), Path("models"), points=STREAMING_POINTS), spill_folder())
    wish = Wish(CONTEXT, 4, prompt, kv=kv or KVPolicy(), kv_is_free=kv is None)
    budget = Budget(int(ram_gib * GIB), 0, "--budget", "no GPU")
    return solve(ask(model, budget, Here(known), wish))  # type: ignore[arg-type]


@pytest.mark.parametrize("kv", [None, KVPolicy(), KVPolicy(KVType.Q8_0, KVType.Q8_0)], ids=["auto", "f16", "q8_0"])
@pytest.mark.parametrize(("model", "ram_gib"), [(LLAMA_1B, 2), (LLAMA_1B, 8), (LLAMA_7B, 8)], ids=["1B/2", "1B", "7B"])
def test_131072_tokens_are_planned(
    monkeypatch: pytest.MonkeyPatch, model: HeaderOnly, ram_gib: float, kv: KVPolicy | None
) -> None:
    monkeypatch.setattr("planner.kv_choice.spill_room", lambda: 1 << 40)
    plan = planned(model, ram_gib, kv)
    assert plan.settings.context_tokens == CONTEXT
    assert plan.needs.ram.needed_bytes <= ram_gib * GIB
    assert plan.predicted.decode_tokens_per_s > 0
    if plan.settings.kv_ram_bytes is None:
        return
    text = " ".join(plan.notes)
    assert "the rest (" in text
    assert "with the context full: " in text


def test_weights_stay_in_ram_where_the_context_does_not() -> None:
    plan = planned(LLAMA_7B, 8, KVPolicy())
    assert plan.settings.stream_slots == 0
    kept = plan.settings.kv_ram_bytes
    assert kept is not None
    assert kept > 3 * GIB


def test_little_ram_is_needed_for_what_lies_on_flash() -> None:
    shape = ask(LLAMA_7B, Budget(8 * GIB, 0, "", ""), Here(profile()), Wish()).shape  # type: ignore[arg-type]
    assert shape.kv_bytes_per_token * CONTEXT == 64 * GIB
    assert least_kv_ram_bytes(shape, CONTEXT) < GIB + GIB // 4


def test_the_speed_at_that_depth_is_what_reading_takes() -> None:
    shallow = planned(LLAMA_7B, 8, KVPolicy(), prompt=128)
    deep = planned(LLAMA_7B, 8, KVPolicy(), prompt=CONTEXT - 128)
    ram_bytes = deep.settings.kv_ram_bytes
    assert ram_bytes is not None
    question = ask(LLAMA_7B, deep.budget, Here(profile()), Wish(CONTEXT, kv=KVPolicy()))  # type: ignore[arg-type]
    reading = cold_bytes(question.shape, CONTEXT, ram_bytes) / 2e9  # the drive's rate in tests
    assert 1 / deep.predicted.decode_tokens_per_s == pytest.approx(reading, rel=0.15)
    assert shallow.predicted.decode_tokens_per_s > 10 * deep.predicted.decode_tokens_per_s


def test_a_described_laptop_of_8_gib() -> None:
    machine = replace(load_machine("laptop-no-gpu"), ram_bytes=8 * GIB)
    wish = Wish(CONTEXT, kv_is_free=True)
    plan = solve(ask(LLAMA_7B, Budget(8 * GIB, 0, "described", "no GPU"), machine, wish))  # type: ignore[arg-type]
    caches = [one for one in plan.placements if one.kind is UnitKind.KV]
    assert any(one.tier is Tier.FLASH for one in caches)
    assert plan.needs.ram.needed_bytes <= 8 * GIB
    assert 0 < plan.predicted.decode_tokens_per_s < 1
