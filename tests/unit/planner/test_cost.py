"""Predicted times: more work takes longer, the right resource is named, and runs correct them."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import cost
from planner.budget import GIB, Budget
from planner.model_shape import ModelShape
from planner.plan import Plan, Settings, WeightsForm
from planner.prediction import Bottleneck, Measurement, Residual
from planner.profile import Profile, save
from planner.solve import make_plan
from tests.support.planning import header, llama_8b, profile

SETTINGS = Settings(4096, 512, 4, WeightsForm.FLOAT32, "float16", "sequential", "cpu")
QUANTISED = replace(SETTINGS, weights_form=WeightsForm.QUANTISED)


def test_decode_is_bound_by_reading_the_active_weights() -> None:
    shape = ModelShape.from_gguf(llama_8b())
    parts = cost.decode_seconds(shape, profile(), SETTINGS, 0)
    weights = shape.active_weights - 4096  # but for the embedding's row
    assert parts[Bottleneck.RAM_BANDWIDTH] == pytest.approx(4 * weights / (cost.MATVEC_SHARE * 40e9))
    assert max(parts, key=lambda part: parts[part]) is Bottleneck.RAM_BANDWIDTH


def test_weights_as_in_the_file_cost_dequantising() -> None:
    shape = ModelShape.from_gguf(llama_8b())
    parts = cost.decode_seconds(shape, profile(), QUANTISED, 0)
    assert parts[Bottleneck.DEQUANTISATION] == pytest.approx(shape.active_bytes / 1e9, rel=1e-3)
    assert max(parts, key=lambda part: parts[part]) is Bottleneck.DEQUANTISATION


def test_small_models_are_bound_by_overhead() -> None:
    parts = cost.decode_seconds(ModelShape.from_gguf(header(width=256)), profile(), SETTINGS, 0)
    assert max(parts, key=lambda part: parts[part]) is Bottleneck.OVERHEAD
    assert Bottleneck.COMPUTE in parts


def test_long_contexts_are_slower() -> None:
    shape = ModelShape.from_gguf(llama_8b())
    near, far = (sum(cost.decode_seconds(shape, profile(), SETTINGS, tokens).values()) for tokens in (0, 4096))
    assert far - near == pytest.approx(cost.KV_READS * shape.kv_bytes_per_token * 4096 / 40e9)


def test_experts_that_are_not_used_cost_nothing_in_decode() -> None:
    few, many = (ModelShape.from_gguf(header(experts=experts, used=2, vocab=512)) for experts in (4, 4096))
    few_s = cost.decode_seconds(few, profile(), QUANTISED, 0)
    many_s = cost.decode_seconds(many, profile(), QUANTISED, 0)
    assert many_s[Bottleneck.OVERHEAD] == few_s[Bottleneck.OVERHEAD]
    assert few_s[Bottleneck.DEQUANTISATION] < many_s[Bottleneck.DEQUANTISATION] < 8 * few_s[Bottleneck.DEQUANTISATION]


def test_long_prompts_are_bound_by_arithmetic() -> None:
    shape = ModelShape.from_gguf(llama_8b())
    seconds = cost.prefill_seconds(shape, profile(), SETTINGS, 512)
    assert seconds == pytest.approx(
        2 * 512 * (shape.active_weights - 4096 * 128256) / (cost.MATMUL_SHARE * 100e9), rel=0.1
    )


@given(
    tokens=st.integers(1, 3000),
    chunk=st.integers(32, 512),
    experts=st.sampled_from([0, 8]),
    form=st.sampled_from(list(WeightsForm)),
)
def test_a_longer_prompt_never_takes_less(tokens: int, chunk: int, experts: int, form: WeightsForm) -> None:
    shape = ModelShape.from_gguf(header(experts=experts, used=min(experts, 2)))
    settings = replace(SETTINGS, prefill_chunk_tokens=chunk, weights_form=form)
    shorter = cost.prefill_seconds(shape, profile(), settings, tokens)
    assert 0 < shorter <= cost.prefill_seconds(shape, profile(), settings, tokens + 1)


def plan_with(machine: Profile) -> Plan:
    return make_plan(llama_8b(), budget=Budget(64 * GIB, 0, "test", "no GPU"), profile=machine, loop="sequential")


def test_what_runs_measure_corrects_the_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    save(profile(), path)
    monkeypatch.setattr(cost, "load_or_measure", lambda path: profile())
    plan = plan_with(profile())
    promised = plan.predicted
    measured = Measurement(promised.decode_tokens_per_s / 2, None, promised.ttft_s * 3, 1, promised.prompt_tokens)
    machine = cost.record_run(plan, measured, path)
    corrected = plan_with(machine).predicted
    assert corrected.decode_tokens_per_s == pytest.approx(measured.decode_tokens_per_s)
    assert corrected.ttft_s == pytest.approx(measured.ttft_s)
    assert corrected.decode_correction.factor == pytest.approx(2.0)
    assert corrected.prefill_correction.runs == 1

    # a plan made with the correction in it does not count it twice
    monkeypatch.setattr(cost, "load_or_measure", lambda path: machine)
    again = cost.record_run(plan_with(machine), measured, path)
    assert plan_with(again).predicted.decode_correction.factor == pytest.approx(2.0)
    assert plan_with(again).predicted.decode_correction.runs == 2

    # other models that run the same way are corrected too, other ways are not
    assert make_plan(
        llama_8b("Q5_K"), budget=plan.budget, profile=machine, loop="sequential"
    ).predicted.decode_correction == Residual(pytest.approx(2.0), 1)  # type: ignore[arg-type]
    assert make_plan(
        llama_8b(), budget=replace(plan.budget, ram_bytes=8 * GIB), profile=machine
    ).predicted.decode_correction == Residual(1.0, 0)


def test_nothing_is_learned_from_what_was_not_measured_or_not_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "load_or_measure", lambda path: profile())
    plan = plan_with(profile())
    for measured in (
        Measurement(None, None, None, 1),
        Measurement(None, 5.0, 1.0, 1, plan.predicted.prompt_tokens + 1),
        Measurement(3.0, None, None, 1, decoded_tokens=cost.LEAST_DECODED_TOKENS - 1),
    ):
        assert cost.record_run(plan, measured, tmp_path / "profile.json") == profile()
