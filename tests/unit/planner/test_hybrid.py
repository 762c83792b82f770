"""Hybrid plans: within both memories whatever is asked, only of what can be executed, quicker than the CPU alone."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.quant_types import QUANT_TYPES
from offload.errors import DoesNotFitError, RequestError
from offload.tiers import Device, Tier
from planner.budget import GIB, MIB, Budget
from planner.gpu_choice import chosen_gpu
from planner.hybrid_memory import gpu_activations_bytes
from planner.hybrid_split import split_of
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Objective, Plan
from planner.plan_check import check_runnable
from planner.question import Here, Wish, ask
from planner.solve import make_plan, solve
from planner.what_if import best_help, what_if
from planner.why import why
from tests.support.planning import GPU, RATES, HeaderOnly, header, llama_8b, olmoe, profile

SIMULATED = "sim:vram={vram},bw=192GB/s,link=6GB/s,tflops=6"


def planned(
    model: HeaderOnly, vram: str, *, ram_bytes: int = 64 * GIB, wish: Wish | None = None, gpu_bytes: int | None = None
) -> Plan:
    gpu = chosen_gpu(SIMULATED.format(vram=vram))
    assert gpu is not None
    room = gpu.free_bytes if gpu_bytes is None else gpu_bytes
    budget = Budget(ram_bytes, room, "test", gpu.name)
    return solve(ask(model, budget, Here(profile(), gpu), wish or Wish(threads=4)))  # type: ignore[arg-type]


def check_executable(plan: Plan) -> None:
    """What goes together is together, and both memories hold all."""
    by_part: dict[tuple[int | None, bool], set[Device]] = defaultdict(set)
    for placement in plan.placements:
        assert (placement.tier, placement.device) in {(Tier.GPU, Device.GPU), (Tier.RAM, Device.CPU)}
        if placement.layer is not None and placement.kind is not UnitKind.EXPERTS:
            attends = placement.kind in (UnitKind.ATTENTION, UnitKind.KV)
            by_part[placement.layer, attends].add(placement.device)
        if placement.kind is UnitKind.EMBEDDING:
            assert placement.device is Device.CPU
        if placement.kind is UnitKind.EXPERTS and placement.device is Device.GPU:
            router = next(p for p in plan.placements if (p.layer, p.kind) == (placement.layer, UnitKind.ROUTER))
            assert router.device is Device.GPU
    assert all(len(devices) == 1 for devices in by_part.values())
    assert plan.needs.ram.needed_bytes <= plan.budget.ram_bytes
    assert plan.needs.gpu.needed_bytes <= plan.budget.gpu_bytes
    assert plan.predicted.peak_gpu_bytes == plan.needs.gpu.peak_bytes


def test_what_the_gpu_saves_is_its() -> None:
    plan = planned(olmoe(), "4GiB")
    alone = make_plan(olmoe(), budget=Budget(64 * GIB, 0, "test", "no GPU"), profile=profile(), threads=4)
    assert plan.settings.loop == "hybrid"
    assert plan.is_simulated
    assert plan.predicted.decode_tokens_per_s > 1.5 * alone.predicted.decode_tokens_per_s
    assert 0 < plan.settings.gpu_slots < 16 * 64
    assert plan.predicted.hit_rate is not None
    assert plan.needs.gpu.slots_bytes > GIB
    check_executable(plan)


def test_experts_with_slots_are_in_ram_too() -> None:
    plan = planned(olmoe(), "2GiB")
    experts = [placement for placement in plan.placements if placement.kind is UnitKind.EXPERTS]
    assert {placement.tier for placement in experts} == {Tier.RAM}
    assert plan.needs.ram.weights_bytes >= sum(placement.num_bytes for placement in experts)


def test_all_of_a_small_model_is_on_a_large_gpu() -> None:
    plan = planned(olmoe(), "8GiB")
    assert [p.unit for p in plan.placements if p.device is Device.CPU] == ["embedding"]
    assert plan.settings.gpu_slots == 16 * 64
    assert plan.needs.gpu.slots_bytes == 0
    shape = ModelShape.from_gguf(olmoe())  # type: ignore[arg-type]
    assert split_of(shape, plan.placements, plan.settings.gpu_slots).resident == frozenset(range(16))


def test_what_ram_does_not_hold_lies_on_the_gpu_alone() -> None:
    budget = Budget(2 * GIB + 3 * GIB, 6 * GIB, "test", "a GPU", 0, 0)
    plan = make_plan(olmoe(), budget=budget, profile=replace(profile(), gpu=RATES), gpu=GPU, context_tokens=512)
    experts = [placement.tier for placement in plan.placements if placement.kind is UnitKind.EXPERTS]
    assert Tier.GPU in experts
    check_executable(plan)


def test_the_largest_chunk_is_reserved_first() -> None:
    plan = planned(llama_8b(), "512MiB")
    shape = ModelShape.from_gguf(llama_8b())  # type: ignore[arg-type]
    chunk, context = plan.settings.prefill_chunk_tokens, plan.settings.context_tokens
    split, in_parts = split_of(shape, plan.placements, 0), plan.settings.gpu_kv_tokens is not None
    wanted = gpu_activations_bytes(shape, chunk, context, split, in_parts=in_parts)
    assert plan.needs.gpu.activations_bytes == wanted
    assert chunk < 512
    assert planned(llama_8b(), "8GiB").settings.prefill_chunk_tokens == 512


def test_a_tied_output_head_takes_its_own_copy() -> None:
    plan = planned(header(layers=4, width=1024, heads=8, ffn=4096, vocab=100_000, tied=True), "1GiB")
    output = next(placement for placement in plan.placements if placement.unit == "output")
    embedding = next(placement for placement in plan.placements if placement.unit == "embedding")
    assert output.device is Device.GPU
    assert output.num_bytes > embedding.num_bytes


@pytest.mark.parametrize("vram", ["1B", "1MiB", "16MiB"])
def test_a_gpu_without_room_is_left_alone(vram: str) -> None:
    plan = planned(llama_8b(), vram)
    assert (plan.settings.loop, plan.settings.device, plan.machine.gpu) == ("program", "cpu", None)
    assert not plan.is_simulated
    assert plan.needs.gpu.needed_bytes == 0
    assert any("simulated GPU is not used" in note for note in plan.notes)


def test_nothing_free_on_the_gpu() -> None:
    assert planned(llama_8b(), "8GiB", gpu_bytes=0).settings.loop == "program"


def test_a_slow_gpu_is_left_alone() -> None:
    gpu = chosen_gpu("sim:vram=8GiB,bw=1GB/s,link=1GB/s,tflops=0.01")
    plan = solve(ask(llama_8b(), Budget(64 * GIB, 8 * GIB, "test", "s"), Here(profile(), gpu), Wish(threads=4)))  # type: ignore[arg-type]
    assert plan.settings.loop == "program"
    assert any("simulated GPU is not used" in note for note in plan.notes)


def test_types_without_kernels_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.hybrid_parts.LAYOUTS", {"F32": None})
    assert planned(llama_8b(), "8GiB").settings.loop == "program"


def test_a_loop_that_needs_a_gpu_says_so() -> None:
    with pytest.raises(RequestError, match="needs a GPU") as caught:
        make_plan(llama_8b(), budget=Budget(64 * GIB, 0, "test", "no GPU"), profile=profile(), loop="hybrid")
    assert "--gpu sim:" in (caught.value.hint or "")


@pytest.mark.parametrize("loop", ["program", "sequential"])
def test_loops_of_the_cpu_leave_a_simulated_gpu_alone(loop: str) -> None:
    plan = planned(llama_8b(), "8GiB", wish=Wish(loop=loop))
    assert (plan.settings.loop, plan.settings.device) == (loop, "cpu")


def test_a_simulated_gpu_takes_ram() -> None:
    small = planned(olmoe(), "4GiB", ram_bytes=6 * GIB)
    assert small.needs.ram.needed_bytes <= 6 * GIB
    if small.settings.loop == "hybrid":
        assert small.needs.ram.process_bytes > small.needs.gpu.peak_bytes


def test_speed_for_objectives() -> None:
    plans = {objective: planned(olmoe(), "4GiB", wish=Wish(objective=objective)) for objective in Objective}
    for plan in plans.values():
        check_executable(plan)
    assert plans[Objective.TTFT].predicted.ttft_s <= 1.1 * plans[Objective.LATENCY].predicted.ttft_s


def test_a_hybrid_plan_survives_its_file_and_is_runnable() -> None:
    for vram in ("1GiB", "4GiB", "8GiB"):
        plan = planned(olmoe(), vram)
        assert check_runnable(Plan.from_json(plan.to_json()), olmoe()) == plan  # type: ignore[arg-type]


def test_why_and_what_if() -> None:
    gpu = chosen_gpu(SIMULATED.format(vram="2GiB"))
    question = ask(olmoe(), Budget(64 * GIB, 2 * GIB, "test", "s"), Here(profile(), gpu), Wish(threads=4))  # type: ignore[arg-type]
    plan = solve(question)
    classes = why(question, plan, "blk.3.experts")
    assert {choice.device for choice in classes if choice.taken} == {Device.CPU, Device.GPU}
    attention = why(question, plan, "blk.3.kv")
    assert {choice.unit for choice in attention} == {"blk.3.attention"}
    assert {choice.device for choice in attention} == {Device.CPU, Device.GPU}
    assert len(what_if(question, plan)) >= 4
    better = best_help(question, plan)
    assert better is not None
    assert better.change == "2.0 GiB more GPU memory"


@st.composite
def models(draw: st.DrawFn) -> HeaderOnly:
    experts = draw(st.sampled_from([0, 8, 64]))
    heads = draw(st.sampled_from([4, 8]))
    return header(
        layers=draw(st.integers(1, 6)),
        width=256 * draw(st.integers(1, 8)),
        heads=heads,
        kv_heads=draw(st.sampled_from([1, heads])),
        ffn=256 * draw(st.integers(1, 8)),
        experts=experts,
        used=draw(st.integers(1, 4)) if experts else 0,
        shared=bool(experts) and draw(st.booleans()),
        vocab=draw(st.sampled_from([100, 32000, 150_000])),
        tied=draw(st.booleans()),
        weights=draw(st.sampled_from([kind.name for kind in QUANT_TYPES.values()])),
    )


@settings(max_examples=30, deadline=None)
@given(
    models(),
    st.integers(0, 4 * GIB),
    st.integers(0, 2 * GIB),
    st.sampled_from(list(Objective)),
    st.booleans(),
    st.sampled_from([None, 1, 100, 4096]),
)
def test_neither_budget_is_exceeded(
    model: HeaderOnly, ram_bytes: int, gpu_bytes: int, objective: Objective, simulated: bool, context: int | None
) -> None:
    gpu = chosen_gpu(SIMULATED.format(vram="2GiB")) if simulated else GPU
    margin = min(64 * MIB, gpu_bytes // 16)
    budget = Budget(ram_bytes, gpu_bytes, "test", "a GPU", ram_bytes // 20, margin)
    here = Here(replace(profile(), gpu=RATES), gpu)
    try:
        plan = solve(ask(model, budget, here, Wish(context, objective=objective)))  # type: ignore[arg-type]
    except DoesNotFitError:
        return
    if plan.settings.loop == "hybrid":
        check_executable(plan)
    assert check_runnable(Plan.from_json(plan.to_json()), model) == plan  # type: ignore[arg-type]
