"""Types of the KV cache in plans: bytes, refusals, notes, other runtimes' flags."""

from dataclasses import replace

import pytest

from cpu_kernels.kv_policy import KVPolicy, window_bytes
from cpu_kernels.kv_types import KVType
from offload.errors import PlanError, RequestError
from planner.budget import GIB, Budget
from planner.gpu_choice import EXAMPLE, chosen_gpu
from planner.kv import check_kv, keeps, kv_notes, kv_type
from planner.llama_cpp_flags import llama_cpp_flags
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.plan_check import check_runnable
from planner.question import Here, Wish, ask
from planner.solve import solve
from tests.support.planning import header, profile

F16 = KVPolicy()
Q8_0 = KVPolicy(KVType.Q8_0, KVType.Q8_0)
KIVI2 = KVPolicy(KVType.KIVI2, KVType.KIVI2)
MODEL = header(layers=4, heads=4, kv_heads=2)  # heads of 64


def planned(kv: KVPolicy, loop: str = "program") -> Plan:
    question = ask(MODEL, Budget(GIB, 0, "test", "no GPU"), Here(profile()), Wish(4096, 2, 512, loop, kv=kv))  # type: ignore[arg-type]
    return solve(question)


def test_bytes_follow_the_types() -> None:
    plain, half = (ModelShape.from_gguf(MODEL, kv) for kv in (F16, Q8_0))  # type: ignore[arg-type]
    assert half.kv_bytes_per_token * 32 == plain.kv_bytes_per_token * 17
    assert plain.kv_window_bytes == half.kv_window_bytes == 0
    least = ModelShape.from_gguf(MODEL, KIVI2)  # type: ignore[arg-type]
    edge, inner = half.kv_bytes_per_layer[0], plain.kv_bytes_per_layer[0] * 11 // 64
    assert least.kv_bytes_per_layer == (edge, inner, inner, edge)
    assert least.kv_window_bytes == 2 * window_bytes(KVType.KIVI2, 2, 64, 256) == 2 * 2 * 64 * 2 * (256 + 128)


def test_plans_promise_memory_and_speed_by_the_types() -> None:
    plain, half = planned(F16), planned(Q8_0)
    assert half.needs.ram.kv_bytes < 0.54 * plain.needs.ram.kv_bytes
    assert half.predicted.decode_tokens_per_s > plain.predicted.decode_tokens_per_s
    assert Plan.from_json(half.to_json()) == half
    assert check_runnable(half, MODEL) == half  # type: ignore[arg-type]
    assert half.settings.kv == Q8_0


def test_a_gpu_holds_and_reads_what_the_types_take() -> None:
    """Activations are as wide as ever."""
    gpu = chosen_gpu(EXAMPLE)
    assert gpu is not None
    budget = Budget(GIB, GIB, "test", gpu.name)
    plain, half = (
        solve(ask(MODEL, budget, Here(profile(), gpu), Wish(4096, 2, 512, "hybrid", kv=kv)))  # type: ignore[arg-type]
        for kv in (F16, Q8_0)
    )
    assert 0 < half.needs.gpu.kv_bytes < 0.54 * plain.needs.gpu.kv_bytes
    assert half.needs.gpu.activations_bytes == plain.needs.gpu.activations_bytes
    assert half.predicted.decode_tokens_per_s > plain.predicted.decode_tokens_per_s
    assert not any("left out" in note for note in half.notes)
    assert check_runnable(Plan.from_json(half.to_json()), MODEL) == half  # type: ignore[arg-type]
    shapes = [ModelShape.from_gguf(MODEL, kv) for kv in (F16, Q8_0)]  # type: ignore[arg-type]
    assert {shape.kv_numbers(0) for shape in shapes} == {2 * 2 * 64}
    assert replace(shapes[0], kv_heads=()).kv_numbers(0) == 2 * 2 * 64


def test_a_plan_whose_types_were_edited_is_refused() -> None:
    plan = planned(Q8_0)
    edited = replace(plan, settings=replace(plan.settings, cache_type_k=KVType.F16))
    with pytest.raises(PlanError, match=r"num_bytes of blk\.0\.kv"):
        check_runnable(edited, MODEL)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"settings\.cache_type_k"):
        Plan.from_json(plan.to_json().replace('"cache_type_k": "q8_0"', '"cache_type_k": "q9_0"'))


def test_loops_that_keep_some_types_alone() -> None:
    assert keeps("sequential", F16)
    assert not keeps("sequential", Q8_0)
    with pytest.raises(PlanError, match=r"settings\.cache_type_k is 'q8_0'; the sequential loop keeps f16"):
        check_kv(Q8_0, "sequential")
    with pytest.raises(PlanError, match="keeps f16"):
        planned(Q8_0, "sequential")
    assert keeps("hybrid", Q8_0)
    assert not keeps("hybrid", KIVI2)
    with pytest.raises(PlanError, match="cache_type_k is 'kivi2'; the hybrid loop keeps f16, bf16, q8_0, q4_0"):
        check_kv(KIVI2, "hybrid")
    with pytest.raises(PlanError, match="cache_type_v is 'kivi2'"):
        check_kv(KVPolicy(KVType.F16, KVType.KIVI2), "llama.cpp")


def test_llama_cpp_is_told_the_nearest_types() -> None:
    flags = llama_cpp_flags(planned(KVPolicy(KVType.Q8_0, KVType.KIVI2)))
    line = flags.line()
    assert "-ctk q8_0 -ctv q4_0" in line
    assert any("has no kivi2" in reason for reason in flags.unlike)
    assert any("first and last too" in reason for reason in flags.unlike)
    plain = llama_cpp_flags(planned(F16))
    assert "-ctk f16 -ctv f16" in plain.line()
    assert not plain.unlike


def test_notes_and_names() -> None:
    assert not list(kv_notes(Q8_0, 4, has_gpu=False))
    assert not list(kv_notes(Q8_0, 4, has_gpu=True))
    for policy in (KIVI2, KVPolicy(budget_tokens=256)):
        assert any("the GPU is left out" in note for note in kv_notes(policy, 4, has_gpu=True))
    assert any("the first and the last layer" in note for note in planned(KIVI2).notes)
    assert kv_type("q4_0", "-ctk") is KVType.Q4_0
    with pytest.raises(RequestError, match="-ctk 'q5' is no type"):
        kv_type("q5", "-ctk")
