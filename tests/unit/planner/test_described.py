"""Plans for described machines: within every budget, whatever the machine, or refused with what would fit."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import DoesNotFitError, PlanError
from offload.tiers import Device, Tier
from planner.budget import GIB, MIB, Budget
from planner.described import with_other_tiers
from planner.machine import Machine
from planner.machine_files import load_machine
from planner.plan import Objective, Plan
from planner.plan_check import check_runnable
from planner.prediction import Bottleneck
from planner.question import Here, Wish, ask
from planner.solve import make_plan
from planner.spread import assignment_of, machine_of, spreads
from tests.support.machines import budget_of, machine
from tests.support.planning import HeaderOnly, header, llama_8b, profile


def planned(model: HeaderOnly, on: Machine, **wishes: object) -> Plan:
    return make_plan(model, budget=budget_of(on), machine=on, **wishes)  # type: ignore[arg-type]


def moe() -> HeaderOnly:
    """14 GB, nearly all of it experts."""
    return header(
        layers=32, width=2048, heads=16, kv_heads=4, ffn=1024, experts=64, used=4, vocab=32000, weights="Q8_0"
    )


def test_everything_in_ram_where_there_is_room_and_no_gpu() -> None:
    plan = planned(llama_8b(), machine(flash_rate=None))
    assert all((p.tier, p.device) == (Tier.RAM, Device.CPU) for p in plan.placements)
    assert plan.predicted.bottleneck is Bottleneck.RAM_BANDWIDTH
    assert plan.machine.name == "a machine"
    assert any("planned and simulated, not run" in note for note in plan.notes)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_slow_cpu_is_bound_by_computing() -> None:
    on = machine(flash_rate=None)
    points = tuple(replace(point, bytes_per_s=4e9) for point in on.cpu.kernels["Q4_0"])
    slow = replace(on, cpu=replace(on.cpu, kernels=dict.fromkeys(on.cpu.kernels, points)))
    assert planned(llama_8b(), slow).predicted.bottleneck is Bottleneck.COMPUTE


def test_small_layers_are_bound_by_their_operations() -> None:
    on = machine(flash_rate=None)
    busy = replace(on, cpu=replace(on.cpu, operation_s=1e-3))
    assert planned(header(), busy).predicted.bottleneck is Bottleneck.OVERHEAD


def test_a_model_on_the_gpu_is_bound_by_its_memory() -> None:
    assert planned(llama_8b(), machine(gpu_bytes=24 * GIB)).predicted.bottleneck is Bottleneck.GPU_BANDWIDTH


def test_a_model_larger_than_ram_is_read_from_flash() -> None:
    on = machine(ram_bytes=8 * GIB)
    plan = planned(moe(), on)
    assert any(p.tier is Tier.FLASH for p in plan.placements)
    assert any("on flash" in note for note in plan.notes)
    faster = planned(moe(), machine(ram_bytes=64 * GIB))
    assert faster.predicted.decode_tokens_per_s > 1.5 * plan.predicted.decode_tokens_per_s


def test_a_gpu_makes_it_faster_and_its_memory_is_kept_to() -> None:
    alone = planned(llama_8b(), machine(ram_bytes=16 * GIB))
    plan = planned(llama_8b(), machine(ram_bytes=16 * GIB, gpu_bytes=4 * GIB))
    assert any(p.device is Device.GPU for p in plan.placements)
    assert 0 < plan.needs.gpu.needed_bytes <= 4 * GIB
    assert plan.predicted.decode_tokens_per_s > alone.predicted.decode_tokens_per_s


@pytest.mark.parametrize(
    "on",
    [
        machine(ram_bytes=16 * GIB),
        machine(ram_bytes=16 * GIB, gpu_bytes=0),
        machine(ram_bytes=16 * GIB, threads=1),
        machine(ram_bytes=2 * GIB),
        machine(ram_bytes=2 * GIB, gpu_bytes=2 * GIB),
        machine(ram_bytes=16 * GIB, flash_rate=40e6),
        machine(ram_bytes=3 * GIB, flash_rate=40e6),
    ],
    ids=["no GPU", "GPU of 0 bytes", "1 core", "2 GiB", "2 GiB and a small GPU", "slow flash", "slow flash needed"],
)
@pytest.mark.parametrize("objective", list(Objective))
def test_adversarial_machines(on: Machine, objective: Objective) -> None:
    plan = planned(llama_8b(), on, objective=objective, context_tokens=512)
    assert plan.needs.ram.needed_bytes <= on.ram_bytes
    assert plan.needs.gpu.needed_bytes <= budget_of(on).gpu_bytes
    assert plan.objective is objective
    assert plan.predicted.decode_tokens_per_s > 0
    assert plan.predicted.ttft_s > 0
    if on.gpu is None or not on.gpu.memory_bytes:
        assert all(p.device is Device.CPU for p in plan.placements)


def test_slow_flash_binds() -> None:
    plan = planned(llama_8b(), machine(ram_bytes=3 * GIB, flash_rate=40e6), context_tokens=512)
    assert plan.predicted.bottleneck is Bottleneck.FLASH
    assert plan.predicted.decode_tokens_per_s < 0.1


def test_without_flash_a_model_beyond_ram_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="may be used") as caught:
        planned(llama_8b(), machine(ram_bytes=2 * GIB, flash_rate=None))
    assert caught.value.needed_bytes > caught.value.available_bytes
    assert "RAM would do" in (caught.value.hint or "")


def test_context_is_cut_or_named() -> None:
    on = machine(ram_bytes=6 * GIB, flash_rate=None)
    long = header(layers=32, width=1024, heads=8, kv_heads=8, ffn=2048, vocab=32000, context=1 << 17, weights="Q8_0")
    with pytest.raises(DoesNotFitError) as caught:
        planned(long, on, context_tokens=1 << 17)
    fitting = int((caught.value.hint or "").split("-c ")[1])
    assert planned(long, on, context_tokens=fitting).settings.context_tokens == fitting
    short = planned(long, machine(ram_bytes=1000 * MIB, flash_rate=None))
    assert short.settings.context_tokens < 4096
    assert any("cut to" in note for note in short.notes)


def test_a_plan_for_another_machine_cannot_be_run() -> None:
    with pytest.raises(PlanError, match="for a machine"):
        check_runnable(planned(llama_8b(), machine()), llama_8b())  # type: ignore[arg-type]


def test_long_prompts_are_predicted_in_chunks() -> None:
    short = planned(llama_8b(), machine(), prompt_tokens=512)
    longer = planned(llama_8b(), machine(), prompt_tokens=1100)
    assert longer.predicted.prompt_tokens == 1100
    assert longer.predicted.ttft_s > 1.9 * short.predicted.ttft_s


def test_a_refusal_names_other_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.spread.machine_here", lambda *_: machine(ram_bytes=4 * GIB))
    budget = Budget(4 * GIB, 0, "free memory", "no GPU")
    asked = ask(llama_8b(), budget, Here(profile()), Wish(context_tokens=512))  # type: ignore[arg-type]
    error = DoesNotFitError("too large", needed_bytes=2, available_bytes=1, hint="6.0 GiB of RAM would do")
    told = with_other_tiers(error, asked)
    assert "6.0 GiB of RAM would do; with parts on flash it would fit, at about" in (told.hint or "")
    assert "does not execute yet" in (told.hint or "")
    monkeypatch.setattr("planner.spread.machine_here", lambda *_: machine(ram_bytes=4 * GIB, flash_rate=None))
    assert with_other_tiers(error, asked) is error


def test_places_that_a_problem_does_not_know_are_refused() -> None:
    on = machine(flash_rate=None)
    asked = ask(llama_8b(), budget_of(on), on, Wish())  # type: ignore[arg-type]
    problem = spreads(asked, machine_of(asked), 512, Objective.LATENCY)[0].problem
    placements = planned(llama_8b(), on).placements
    assert len(assignment_of(problem, placements)) == len(problem.items)
    with pytest.raises(PlanError, match="is no option here"):
        assignment_of(problem, [replace(p, tier=Tier.GPU, device=Device.GPU) for p in placements])


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 12),
    width=st.sampled_from([256, 1024, 4096]),
    experts=st.sampled_from([0, 8, 32]),
    ram_bytes=st.integers(0, 1 << 35),
    gpu_bytes=st.none() | st.integers(0, 1 << 34),
    flash_rate=st.none() | st.floats(1e7, 1e10),
    context=st.none() | st.integers(1, 1 << 15),
    threads=st.integers(1, 16),
    objective=st.sampled_from(Objective),
)
def test_a_plan_never_exceeds_its_budget(
    *,
    layers: int,
    width: int,
    experts: int,
    ram_bytes: int,
    gpu_bytes: int | None,
    flash_rate: float | None,
    context: int | None,
    threads: int,
    objective: Objective,
) -> None:
    model = header(layers=layers, width=width, ffn=2 * width, experts=experts, used=min(experts, 2), vocab=32000)
    on = machine(ram_bytes=ram_bytes, threads=threads, gpu_bytes=gpu_bytes, flash_rate=flash_rate)
    try:
        plan = planned(model, on, context_tokens=context, objective=objective)
    except DoesNotFitError as error:
        assert error.needed_bytes > error.available_bytes == ram_bytes
        return
    assert plan.needs.ram.needed_bytes <= ram_bytes
    assert plan.needs.gpu.needed_bytes <= (gpu_bytes or 0)
    assert context is None or plan.settings.context_tokens == context
    assert plan.predicted.decode_tokens_per_s > 0
    assert Plan.from_json(plan.to_json()) == plan


def test_dense_weights_are_loaded_to_the_gpu_for_prompts_and_never_for_a_token() -> None:
    """The link reads the same RAM as the CPU: only where the CPU computes longer than a copy takes it pays."""
    loaded = {
        objective: sum(
            p.device is Device.GPU and p.tier is not Tier.GPU
            for p in planned(llama_8b(), load_machine("laptop"), objective=objective).placements
        )
        for objective in (Objective.LATENCY, Objective.TTFT)
    }
    assert loaded[Objective.LATENCY] == 0
    assert loaded[Objective.TTFT] > 0
