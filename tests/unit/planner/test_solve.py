"""Plans: within the budget whatever is asked, refused with reasons where nothing fits."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.quant_types import QUANT_TYPES, unknown_quant_type
from gpu_kernels.bandwidth import GpuRates
from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import DoesNotFitError, PlanError, RequestError, StrataError, UnsupportedModelError
from offload.tiers import Device, Tier
from planner import solve
from planner.budget import GIB, MIB, Budget
from planner.model_shape import UnitKind
from planner.plan import Objective, Plan, WeightsForm
from planner.profile import Profile
from planner.solve import for_prompt, make_plan, plan_here
from tests.support.planning import HeaderOnly, header, llama_8b, profile

GPU = GpuCapabilities("a GPU", 80 * GIB, 78 * GIB, (9, 0), "cuda:0")
RATES = GpuRates("a GPU", 2e12, 50e12, 5e-6)


def ram(num_bytes: int) -> Budget:
    return Budget(num_bytes, 0, "test", "no GPU")


def test_small_model_is_held_as_float32() -> None:
    plan = make_plan(header(), budget=ram(GIB), profile=profile(), loop="sequential")
    assert plan.settings.weights_form is WeightsForm.FLOAT32
    assert plan.settings.context_tokens == 4096
    assert all(p.tier is Tier.RAM and p.device is Device.CPU for p in plan.placements)
    assert sum(p.num_bytes for p in plan.placements) == plan.needs.ram.weights_bytes + plan.needs.ram.kv_bytes
    assert [p.unit for p in plan.placements][:4] == ["embedding", "blk.0.attention", "blk.0.kv", "blk.0.dense_ffn"]


def test_larger_model_is_held_as_in_the_file() -> None:
    plan = make_plan(llama_8b(), budget=ram(8 * GIB), profile=profile(), loop="sequential")
    assert plan.settings.weights_form is WeightsForm.QUANTISED
    assert any("made float32 on every use" in note for note in plan.notes)
    assert plan.predicted.bottleneck.value == "dequantisation"


def test_by_default_weights_are_packed_for_the_cpus_kernels() -> None:
    plan = make_plan(llama_8b(), budget=ram(8 * GIB), profile=profile())
    assert plan.settings.loop == "program"
    assert plan.settings.weights_form is WeightsForm.PACKED
    assert plan.needs.ram.weights_bytes == sum(p.num_bytes for p in plan.placements if p.kind is not UnitKind.KV)
    slow = make_plan(llama_8b(), budget=ram(8 * GIB), profile=profile(), loop="sequential")
    assert plan.predicted.decode_tokens_per_s > 5 * slow.predicted.decode_tokens_per_s


def test_types_with_larger_panels_are_counted_so() -> None:
    plain, coded = (make_plan(llama_8b(name), budget=ram(64 * GIB), profile=profile()) for name in ("Q2_K", "IQ1_S"))
    assert coded.needs.ram.weights_bytes > 1.8 * coded.model.byte_size
    assert plain.needs.ram.weights_bytes <= 1.01 * plain.model.byte_size


def test_unknown_loops_are_refused() -> None:
    with pytest.raises(RequestError, match="no loop"):
        make_plan(header(), budget=ram(GIB), profile=profile(), loop="fastest")


def test_context_is_chosen_and_said() -> None:
    plan = make_plan(llama_8b(), budget=ram(64 * GIB), profile=profile())
    assert plan.settings.context_tokens == 4096
    assert any("-c sets up to the 8192" in note for note in plan.notes)
    assert make_plan(header(context=512), budget=ram(GIB), profile=profile()).settings.context_tokens == 512


def test_context_is_cut_where_memory_is_short() -> None:
    full = make_plan(llama_8b(), budget=ram(64 * GIB), profile=profile(), context_tokens=4096, loop="sequential")
    short = full.needs.ram.needed_bytes - full.needs.ram.weights_bytes + full.model.byte_size - 600 * MIB
    plan = make_plan(llama_8b(), budget=ram(short), profile=profile(), loop="sequential")
    assert 64 <= plan.settings.context_tokens < 4096
    assert plan.settings.context_tokens % 64 == 0
    assert any("cut to" in note for note in plan.notes)
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(llama_8b(), budget=ram(short), profile=profile(), context_tokens=8192, loop="sequential")
    hint = caught.value.hint or ""
    fitting = int(hint.split("-c ")[1])
    assert make_plan(llama_8b(), budget=ram(short), profile=profile(), context_tokens=fitting, loop="sequential")
    with pytest.raises(DoesNotFitError):
        make_plan(llama_8b(), budget=ram(short), profile=profile(), context_tokens=fitting + 64, loop="sequential")


def test_prefill_chunk_shrinks_before_anything_is_refused() -> None:
    wide = header(width=512, heads=8, ffn=1 << 16, layers=1)
    full = make_plan(wide, budget=ram(4 * GIB), profile=profile(), context_tokens=1024, loop="sequential")
    assert full.settings.prefill_chunk_tokens == 512
    weights = full.needs.ram.weights_bytes
    budget = ram(full.needs.ram.needed_bytes - weights + wide.byte_size - 100 * MIB)
    plan = make_plan(wide, budget=budget, profile=profile(), context_tokens=1024, loop="sequential")
    assert plan.settings.prefill_chunk_tokens < 512
    assert any("tokens at a time" in note for note in plan.notes)


def test_refusal_names_needed_available_and_what_would_do() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(llama_8b("F16"), budget=ram(8 * GIB), profile=profile(), loop="sequential")
    error = caught.value
    assert isinstance(error, PlanError)
    assert error.available_bytes == 8 * GIB < error.needed_bytes
    message = str(error)
    assert "models/test.gguf" in message
    assert "8.0 GiB may be used (test)" in message
    assert "weights 15.0 GiB, KV cache 512 MiB" in message
    assert error.hint is not None
    assert "of RAM would do" in error.hint
    assert "this model as Q6_K or smaller" in error.hint


def test_no_quant_type_is_named_where_none_would_fit() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(llama_8b(), budget=ram(100 * MIB), profile=profile())
    assert caught.value.hint is not None
    assert "smaller" not in caught.value.hint


def test_context_beyond_training_is_noted() -> None:
    plan = make_plan(header(context=512), budget=ram(GIB), profile=profile(), context_tokens=1024)
    assert plan.settings.context_tokens == 1024
    assert any("beyond the 512 of the training" in note for note in plan.notes)


def test_threads() -> None:
    assert make_plan(llama_8b(), budget=ram(64 * GIB), profile=profile(threads=4)).settings.threads == 4
    small = make_plan(header(), budget=ram(GIB), profile=profile(threads=4))
    assert small.settings.threads == 1
    assert any("too small to be shared" in note for note in small.notes)
    many = make_plan(header(), budget=ram(GIB), profile=profile(threads=4), threads=8)
    assert many.settings.threads == 8
    assert any("8 threads are more than the 4" in note for note in many.notes)


@pytest.mark.parametrize("wrong", [{"context_tokens": 0}, {"context_tokens": 1 << 40}, {"threads": 0}])
def test_absurd_requests_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        make_plan(header(), budget=ram(GIB), profile=profile(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError):
        make_plan(header(), budget=ram(GIB), profile=profile(), prompt_tokens=0)


def test_unknown_quant_types_are_refused_by_name() -> None:
    model = header()
    name = "blk.0.attn_q.weight"
    model.tensors[name] = replace(model.tensors[name], quant_type=unknown_quant_type(42))
    with pytest.raises(UnsupportedModelError, match=r"type 42 of tensor blk\.0\.attn_q\.weight"):
        make_plan(model, budget=ram(GIB), profile=profile())


def test_everything_on_the_gpu_where_it_fits() -> None:
    budget = Budget(16 * GIB, 78 * GIB, "test", "a GPU")
    plan = make_plan(llama_8b(), budget=budget, profile=replace(profile(), gpu=RATES), gpu=GPU)
    assert (plan.settings.loop, plan.settings.device, plan.machine.gpu) == ("hybrid", "cuda:0", "a GPU")
    assert [p.unit for p in plan.placements if p.tier is not Tier.GPU] == ["embedding"]
    assert plan.predicted.peak_gpu_bytes == plan.needs.gpu.peak_bytes
    slow = make_plan(llama_8b(), budget=budget, profile=replace(profile(), gpu=RATES), gpu=GPU, loop="sequential")
    assert all(p.tier is Tier.GPU and p.device is Device.GPU for p in slow.placements)
    assert slow.needs.gpu.weights_bytes > 29 * GIB > slow.needs.ram.peak_bytes
    assert slow.predicted.bottleneck.value == "GPU bandwidth"


@pytest.mark.parametrize("gpu_bytes", [0, 512 * MIB])
def test_in_ram_where_the_gpu_is_too_small(gpu_bytes: int) -> None:
    budget = Budget(64 * GIB, gpu_bytes, "test", "a GPU")
    plan = make_plan(llama_8b(), budget=budget, profile=replace(profile(), gpu=RATES), gpu=GPU)
    assert plan.settings.device == "cpu"
    assert plan.needs.gpu.needed_bytes == 0
    assert any("a GPU is not used" in note for note in plan.notes)


def test_prediction_for_another_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "load_or_measure", profile)
    model = llama_8b()
    plan = make_plan(model, budget=ram(8 * GIB), profile=profile())
    longer = for_prompt(plan, model, 1000)
    assert longer.predicted.prompt_tokens == 1000
    assert longer.predicted.ttft_s > plan.predicted.ttft_s
    assert replace(longer, predicted=plan.predicted) == plan
    assert for_prompt(plan, model, 10**9).predicted.prompt_tokens == plan.settings.context_tokens


def test_plan_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "load_or_measure", profile)
    plan = plan_here(header(), threads=2)
    assert plan.settings.threads == 2
    assert plan.budget.ram_bytes > 0


def test_the_objective_decides_between_devices() -> None:
    """A GPU that multiplies fast and reads slowly: the prompt is read there, the answer written by the CPU."""
    budget = Budget(64 * GIB, 78 * GIB, "test", "a GPU")
    machine = replace(profile(), gpu=GpuRates("a GPU", 20e9, 50e12, 5e-6))
    chosen = {
        objective: make_plan(
            llama_8b(), budget=budget, profile=machine, gpu=GPU, objective=objective, prompt_tokens=2000
        )
        for objective in Objective
    }
    assert chosen[Objective.LATENCY].settings.device == "cpu"
    assert chosen[Objective.TTFT].settings.device == "cuda:0"
    assert all(plan.objective is objective for objective, plan in chosen.items())
    assert any("a GPU is not used" in note for note in chosen[Objective.LATENCY].notes)
    speeds = {objective: plan.predicted for objective, plan in chosen.items()}
    assert speeds[Objective.TTFT].ttft_s < speeds[Objective.LATENCY].ttft_s


def test_one_core() -> None:
    plan = make_plan(llama_8b(), budget=ram(8 * GIB), profile=profile(threads=1))
    assert plan.settings.threads == 1


def test_one_gib_of_ram_is_refused_with_the_budget_that_would_do() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(llama_8b(), budget=Budget(GIB, 0, "--budget", "no GPU"), profile=profile())
    hint = caught.value.hint or ""
    enough = int(hint.split("--budget ram=")[1].split("MiB")[0]) * MIB
    assert make_plan(llama_8b(), budget=ram(enough), profile=profile(), context_tokens=4096)


def test_a_plan_is_for_one_machine() -> None:
    with pytest.raises(ValueError, match="for this machine, by its profile, or for a described"):
        make_plan(header(), budget=ram(GIB))


@st.composite
def models(draw: st.DrawFn) -> HeaderOnly:
    experts = draw(st.sampled_from([0, 8, 64]))
    return header(
        layers=draw(st.integers(1, 40)),
        width=256 * draw(st.integers(1, 16)),
        heads=draw(st.sampled_from([4, 8])),
        kv_heads=draw(st.sampled_from([1, 4])),
        ffn=256 * draw(st.integers(1, 24)),
        experts=experts,
        used=min(experts, draw(st.integers(1, 8))),
        vocab=draw(st.sampled_from([512, 32000, 256000])),
        tied=draw(st.booleans()),
        context=draw(st.integers(1, 1 << 20)),
        weights=draw(
            st.sampled_from(sorted(t.name for t in QUANT_TYPES.values() if t.name in ("F16", "Q4_K", "TQ1_0")))
        ),
    )


@settings(max_examples=60, deadline=None)
@given(
    model=models(),
    ram_bytes=st.integers(0, 1 << 38),
    margin=st.integers(0, 1 << 31),
    gpu_bytes=st.none() | st.integers(0, 1 << 37),
    context=st.none() | st.integers(1, 1 << 18),
    threads=st.none() | st.integers(1, 64),
    cores=st.integers(1, 64),
)
def test_a_plan_never_exceeds_its_budget(
    *,
    model: HeaderOnly,
    ram_bytes: int,
    margin: int,
    gpu_bytes: int | None,
    context: int | None,
    threads: int | None,
    cores: int,
) -> None:
    machine: Profile = replace(profile(threads=cores), gpu=RATES)
    budget = Budget(ram_bytes, gpu_bytes or 0, "test", "test", min(margin, ram_bytes), 0)
    gpu = None if gpu_bytes is None else GPU
    try:
        plan = make_plan(model, budget=budget, profile=machine, context_tokens=context, threads=threads, gpu=gpu)
    except DoesNotFitError as error:
        assert error.needed_bytes > error.available_bytes == ram_bytes
        return
    except StrataError as error:
        raise AssertionError("a plan or a refusal, nothing else") from error
    assert plan.needs.ram.needed_bytes <= ram_bytes
    assert plan.needs.gpu.needed_bytes <= (gpu_bytes or 0)
    assert context is None or plan.settings.context_tokens == context
    assert sum(p.num_bytes for p in plan.placements if p.kind is UnitKind.KV) in (
        plan.needs.ram.kv_bytes,
        plan.needs.gpu.kv_bytes,
    )
    assert plan.predicted.decode_tokens_per_s > 0
    assert Plan.from_json(plan.to_json()) == plan
