"""Bundles of models: what is in them, and that their bytes are those that `PanelWeights` has in memory."""

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.isa import current, runnable_isas
from offload.errors import ModelFormatError, UnsupportedModelError
from offload.gguf import GGUFFile
from runtime import packing
from runtime.architectures import describe
from runtime.packing import BundlePacker, ModelBundle, layout_name, model_bundles
from runtime.panel import Panel
from runtime.panels import PanelWeights
from tests.support import models

CASES = [
    ("mixtral", "Q8_0"),
    ("olmoe", "Q4_K"),
    ("qwen2moe", "F16"),
    ("llama", "Q4_K"),
    ("phi3", "Q8_0"),
    ("bitnet", "TQ2_0"),
]


def in_memory(panel: Panel, expert: int) -> NDArray[np.uint8]:
    """The bytes of a matrix's panels, or of an expert's."""
    num_bytes = panel.form.panel_bytes(panel.rows, panel.columns)
    start = panel.address + expert * panel.expert_bytes
    return np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(start), np.uint8)


@pytest.mark.parametrize(("name", "quant_type"), CASES)
def test_bundles_are_what_a_loaded_model_has_in_memory(name: str, quant_type: str, tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "model.gguf", models.FAMILIES[name], quant_type)
    with GGUFFile.open(path) as gguf:
        model = describe(gguf)
        weights = PanelWeights(gguf, model)
        weights.load()
        packer = BundlePacker(gguf, current())
        for bundle in model_bundles(model, current()):
            packed = packer.pack(bundle, packer.read(bundle))
            assert packed.nbytes == bundle.num_bytes
            end = 0
            for matrix in bundle.matrices:
                assert matrix.offset == end
                end += matrix.num_bytes
                expected = in_memory(weights.panel(matrix.tensor), bundle.expert or 0)
                np.testing.assert_array_equal(packed[matrix.offset : end], expected)


def bundles_of(name: str, tmp_path: Path) -> tuple[ModelBundle, ...]:
    with GGUFFile.open(models.write_model(tmp_path / "model.gguf", models.FAMILIES[name], "Q8_0")) as gguf:
        return model_bundles(describe(gguf), current())


def test_a_mixture_of_experts_has_two_bundles_an_expert(tmp_path: Path) -> None:
    bundles = bundles_of("mixtral", tmp_path)
    assert [bundle.name for bundle in bundles[:4]] == [
        "blk.0.ffn_gate_exps+ffn_up_exps.0",
        "blk.0.ffn_down_exps.0",
        "blk.0.ffn_gate_exps+ffn_up_exps.1",
        "blk.0.ffn_down_exps.1",
    ]
    assert [(bundle.layer, bundle.expert, bundle.part) for bundle in bundles] == [
        (layer, expert, part) for layer in range(2) for expert in range(6) for part in range(2)
    ]
    assert bundles[0].source_bytes == 2 * 256 * 256 // 32 * 34


def test_a_dense_model_has_a_bundle_for_what_is_multiplied_together(tmp_path: Path) -> None:
    bundles = bundles_of("llama", tmp_path)
    assert [bundle.name for bundle in bundles[:5]] == [
        "blk.0.attn_output",
        "blk.0.attn_q+attn_k+attn_v",
        "blk.0.ffn_gate+ffn_up",
        "blk.0.ffn_down",
        "blk.1.attn_output",
    ]
    assert {bundle.expert for bundle in bundles} == {None}
    assert [bundle.part for bundle in bundles] == [0, 1, 2, 3] * 2


def test_a_type_without_kernels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "has_panel_format", lambda quant_type: False)
    with pytest.raises(UnsupportedModelError, match=r"no kernel for tensor \S+ of type Q8_0"):
        bundles_of("mixtral", tmp_path)


def test_a_bundle_that_is_not_finite_is_never_handed_out(tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "model.gguf", models.FAMILIES["mixtral"], "Q8_0")
    with GGUFFile.open(path) as gguf:
        tensor = gguf.tensors["blk.1.ffn_down_exps.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset + 3 * tensor.num_bytes // 6 + 34 * 7)
        file.write(np.float16("nan").tobytes())
    with GGUFFile.open(path) as gguf:
        packer = BundlePacker(gguf, current())
        for bundle in model_bundles(describe(gguf), current()):
            data = packer.read(bundle)
            if bundle.name == "blk.1.ffn_down_exps.3":
                with pytest.raises(ModelFormatError, match=r"tensor blk.1.ffn_down_exps.weight holds weights that"):
                    packer.pack(bundle, data)
            else:
                packer.pack(bundle, data)


def test_layouts_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GGUFFile.open(models.write_model(tmp_path / "model.gguf", models.FAMILIES["mixtral"], "Q8_0")) as gguf:
        model = describe(gguf)
    names = {layout_name(model_bundles(model, isa), isa) for isa in runnable_isas()}
    assert len(names) == len(runnable_isas())
    bundles = model_bundles(model, current())
    name = layout_name(bundles, current())
    assert name == layout_name(bundles[:1], current())
    assert name.startswith(f"{current().name}-")

    def otherwise(*arguments: object) -> NDArray[np.uint8]:
        packed = packed_sample(*arguments)
        packed[100] ^= 1
        return packed

    packed_sample = packing._packed_sample
    monkeypatch.setattr(packing, "_packed_sample", otherwise)
    assert layout_name(bundles, current()) != name


def test_types_make_layouts(tmp_path: Path) -> None:
    names = set()
    for quant_type in ("Q8_0", "F16"):
        path = models.write_model(
            tmp_path / f"{quant_type}.gguf", replace(models.FAMILIES["llama"], blocks=1), quant_type
        )
        with GGUFFile.open(path) as gguf:
            names.add(layout_name(model_bundles(describe(gguf), current()), current()))
    assert len(names) == 2
