"""Models run with the kernels that were chosen on a machine: what is chosen for which, and that results agree."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.formats import chosen_format
from cpu_kernels.isa import current
from cpu_kernels.tuning import Choice, Family, Tuning
from offload.gguf import GGUFFile
from planner import kernel_choice
from planner.kernel_choice import chosen_kernels
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.solve import plan_here
from runtime.architectures import describe
from runtime.backend import make_executor
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor
from runtime.packing import BundlePacker, layout_name, model_bundles
from runtime.panels import PanelWeights
from tests.support import models, planning
from tests.support.divergence import max_kl_divergence

IDS = models.prompt(length=24)
TABLES = Tuning(current().name, {"TQ2_0": Choice(Family.TABLES, 4)})
TABLES_MAX_KL = 5e-2  # nats, between random models; 2.2e-2 measured. One scale for 64 activations, not for 32
TILES = Tuning(current().name, {"Q8_0": Choice(Family.DOT, 4 if current().tile_columns == 8 else 8)})


def logits_of(path: Path, tuning: Tuning | None) -> np.ndarray:
    with GGUFFile.open(path) as gguf:
        model = describe(gguf)
        weights = PanelWeights(gguf, model, tuning=tuning)
        weights.load()
        executor = ProgramExecutor(model, weights)
        try:
            return executor.forward([Step(IDS, executor.new_kv(len(IDS)))], logits="all")[0]
        finally:
            executor.close()


def test_a_tile_of_another_shape_changes_no_bit(tmp_path: Path) -> None:
    for name in ("llama", "qwen3moe"):
        path = models.write_model(tmp_path / f"{name}.gguf", models.FAMILIES[name], "Q8_0")
        np.testing.assert_array_equal(logits_of(path, TILES), logits_of(path, None))


def test_tables_agree_with_dot_products_but_for_the_rounding_of_activations(tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "model.gguf", models.FAMILIES["bitnet"], "TQ2_0")
    tables, dots = logits_of(path, TABLES), logits_of(path, None)
    assert not np.array_equal(tables, dots)
    assert max_kl_divergence(dots, tables) <= TABLES_MAX_KL


def test_bundles_are_packed_as_chosen(tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "model.gguf", models.FAMILIES["bitnet"], "TQ2_0")
    with GGUFFile.open(path) as gguf:
        usual, chosen = (model_bundles(describe(gguf), current(), tuning) for tuning in (None, TABLES))
        packer = BundlePacker(gguf, current())
        assert layout_name(usual, current()) != layout_name(chosen, current())
        for bundle in chosen:
            assert {matrix.form.family for matrix in bundle.matrices} == {Family.TABLES}
            assert packer.pack(bundle, packer.read(bundle)).nbytes == bundle.num_bytes


def test_small_models_and_forced_rungs_keep_the_usual_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    profile, large = planning.profile(), ModelShape.from_gguf(planning.llama_8b())
    chosen = chosen_kernels(profile, large)
    assert chosen is not None
    assert set(chosen.choices) == {name for name, _ in large.weights_by_type}
    assert chosen_kernels(replace(profile, tuning=None), large) is None
    assert chosen_kernels(profile, ModelShape.from_gguf(planning.header())) is None
    monkeypatch.setenv("STRATA_ISA", current().name)
    assert chosen_kernels(profile, large) is None


def test_a_plan_carries_the_choice_and_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = models.write_model(tmp_path / "model.gguf", models.FAMILIES["bitnet"], "TQ2_0")
    expected = logits_of(path, TABLES)
    monkeypatch.setattr(kernel_choice, "TUNED_BYTES", 0)
    with GGUFFile.open(path) as gguf:
        made = plan_here(gguf, loop="program", threads=1)
        assert made.settings.tuning is not None
        assert chosen_format(describe(gguf).output.quant_type, current(), made.settings.tuning)
        plan = Plan.from_json(replace(made, settings=replace(made.settings, tuning=TABLES)).to_json())
        for tuning, same in ((TABLES, True), (Tuning("other", TABLES.choices), False)):
            planned = replace(plan, settings=replace(plan.settings, tuning=tuning))
            with caplog.at_level(logging.WARNING):
                executor = make_executor(gguf, planned, on_load=None)
            result = executor.forward([Step(IDS, executor.new_kv(len(IDS)))], logits="all")[0]
            executor.close()
            assert np.array_equal(result, expected) is same
    assert "the plan's kernels were chosen for other" in caplog.text
