"""Weights in panels: what they hold, how they are joined, how much memory loading takes, and what is refused."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from cpu_kernels.panel_rows import PanelRows
from cpu_kernels.reference.dequantize import dequantize
from offload.errors import ModelFormatError, UnsupportedModelError
from offload.gguf import GGUFFile
from runtime import panels as panels_module
from runtime.architectures import describe
from runtime.panel import Panel, joined
from runtime.panels import PanelWeights
from tests.support import models
from tests.support.random_weights import quantised

SPEC = models.Spec("qwen3moe", blocks=1, qk_norm="head", experts=4)
TIED = models.Spec("qwen2", blocks=1, biases=("attn_q",), tied=True)


@contextmanager
def loaded(path: Path) -> Iterator[tuple[PanelWeights, GGUFFile]]:
    with GGUFFile.open(path) as file:
        weights = PanelWeights(file, describe(file))
        weights.load()
        yield weights, file


def matrix_of(panel: Panel, expert: int = 0) -> np.ndarray:
    """The rows of a panel, decoded."""
    address = panel.address + expert * panel.expert_bytes
    return PanelRows(panel.form, address, panel.rows, panel.columns).read(range(panel.rows))


@pytest.fixture(scope="module", params=models.QUANT_TYPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "model.gguf", SPEC, request.param)


@pytest.mark.parametrize("unit_bytes", [panels_module.UNIT_BYTES, 1 << 15])
def test_every_tensor_is_what_the_gguf_package_reads(
    path: Path, unit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels_module, "UNIT_BYTES", unit_bytes)
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with loaded(path) as (weights, file):
        for name, tensor in file.tensors.items():
            expected = gguf.quants.dequantize(reference[name].data, reference[name].tensor_type)
            if "norm" in name:
                np.testing.assert_array_equal(weights.vector(tensor), expected)
                assert weights.vector(tensor).dtype == np.float32
            elif name == "token_embd.weight":
                np.testing.assert_array_equal(weights.embeddings([5, 0, 383, 5]), expected[[5, 0, 383, 5]])
            elif tensor.num_experts:
                for expert in range(tensor.num_experts):
                    np.testing.assert_allclose(
                        matrix_of(weights.panel(tensor), expert), expected[expert], rtol=4e-7, atol=1e-8
                    )
            else:
                np.testing.assert_allclose(matrix_of(weights.panel(tensor)), expected, rtol=4e-7, atol=1e-8)


@pytest.mark.parametrize("quant_type", [*models.QUANT_TYPES, "Q4_0", "Q5_1", "TQ1_0"])
def test_rows_of_a_tied_embedding_come_from_the_outputs_panels(quant_type: str, tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "model.gguf", TIED, quant_type)
    with loaded(path) as (weights, file):
        tensor = file.tensors["token_embd.weight"]
        expected = dequantize(file.read(tensor).reshape(models.VOCAB, -1), tensor.quant_type)
        np.testing.assert_allclose(weights.embeddings(range(models.VOCAB)), expected, rtol=4e-7, atol=1e-8)
        if quant_type != "TQ1_0":  # its panels have 64 bytes where the file has 54
            assert weights.num_bytes < 1.01 * sum(tensor.num_bytes for tensor in file.tensors.values())
        with pytest.raises(IndexError, match="row 384 of 384"):
            weights.embeddings([384])


def test_matrices_of_the_same_activations_are_joined(path: Path) -> None:
    with loaded(path) as (weights, file):

        def panels(*names: str) -> list[Panel]:
            return [weights.panel(file.tensors[f"blk.0.{name}.weight"]) for name in names]

        parts = panels("attn_q", "attn_k", "attn_v")
        whole = joined(parts)
        assert whole is not None
        np.testing.assert_array_equal(matrix_of(whole), np.concatenate([matrix_of(part) for part in parts]))
        assert joined(parts[::-1]) is None
        assert joined(panels("attn_q", "attn_output")) is None
        parts = panels("ffn_gate_exps", "ffn_up_exps")
        whole = joined(parts)
        assert whole is not None
        for expert in range(4):
            both = np.concatenate([matrix_of(part, expert) for part in parts])
            np.testing.assert_array_equal(matrix_of(whole, expert), both)


def test_rows_that_do_not_fill_a_group_are_not_joined(tmp_path: Path) -> None:
    spec = models.Spec("llama", blocks=1, heads=2, kv_heads=1, key_length=20, ffn=40)
    with loaded(models.write_model(tmp_path / "model.gguf", spec)) as (weights, file):
        parts = [weights.panel(file.tensors[f"blk.0.ffn_{name}.weight"]) for name in ("gate", "up")]
        assert joined(parts) is None
        assert joined(parts[:1]) == parts[0]


def test_types_that_differ_are_not_joined(tmp_path: Path) -> None:
    def mixed(
        rng: np.random.Generator, shape: tuple[int, ...], deviation: float, quant_type: str
    ) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        return quantised(rng, shape, deviation, "F16" if shape[0] == 128 else quant_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "quantised", mixed)
        path = models.write_model(tmp_path / "model.gguf", models.Spec("llama", blocks=1), "Q8_0")
    with loaded(path) as (weights, file):
        parts = [weights.panel(file.tensors[f"blk.0.attn_{name}.weight"]) for name in "qkv"]
        assert joined(parts) is None
        assert joined(parts[1:]) is not None


def test_progress_counts_the_bytes_of_all_tensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels_module, "UNIT_BYTES", 1 << 15)
    heard: list[tuple[int, int]] = []
    with GGUFFile.open(path) as file:
        model = describe(file)
        PanelWeights(file, model).load(lambda *counts: heard.append(counts))
        total = sum(tensor.num_bytes for _, tensor in model.tensors())
    assert heard[-1] == (total, total)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert len(heard) > 20


def test_memory_is_that_of_the_file(path: Path) -> None:
    with loaded(path) as (weights, file):
        stored = sum(tensor.num_bytes for tensor in file.tensors.values())
        # the router's four rows fill a group of up to 32
        assert stored <= weights.num_bytes <= stored + 32 * 4 * models.HIDDEN


def test_loading_needs_little_beside_the_panels(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels_module, "UNIT_BYTES", 1 << 15)
    with GGUFFile.open(path) as file:
        model = describe(file)
        PanelWeights(file, model).load()  # compiles the kernels
        weights = PanelWeights(file, model)
        tracemalloc.start()  # which does not see the panels themselves
        weights.load()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    row_bytes = model.output.quant_type.row_bytes(models.HIDDEN)
    unit_bytes = max(panels_module.UNIT_BYTES, panels_module.GROUPS_A_UNIT * 32 * row_bytes)  # groups of up to 32 rows
    assert peak < model.token_embd.num_bytes + 3 * unit_bytes + (128 << 10)


@pytest.mark.parametrize(
    ("quant_type", "tensor", "byte", "value"),
    [
        ("F32", "blk.0.attn_norm.weight", 400, np.float32("nan")),
        ("F32", "output.weight", 4 * 256 * 383, np.float32("-inf")),
        ("F16", "blk.0.attn_k.weight", 512, np.float16("inf")),
        ("Q8_0", "blk.0.attn_q.weight", 34 * 9, np.float16("nan")),
        ("Q4_K", "blk.0.attn_output.weight", 144 * 5 + 2, np.float16("inf")),
        ("Q8_0", "blk.0.ffn_down_exps.weight", 34 * 8 * 256 * 3, np.float16("nan")),
        ("F32", "blk.0.ffn_gate_inp.weight", 0, np.float32("nan")),
    ],
)
def test_loading_names_a_tensor_that_is_not_finite(
    quant_type: str, tensor: str, byte: int, value: np.generic, tmp_path: Path
) -> None:
    path = damaged(tmp_path, quant_type, tensor, byte, value)
    with pytest.raises(ModelFormatError, match=f"model.gguf: tensor {tensor} holds weights that are not"), loaded(path):
        pass


def test_an_embedding_that_is_not_finite_is_named_on_first_use(tmp_path: Path) -> None:
    path = damaged(tmp_path, "F16", "token_embd.weight", 2 * 256 * 7, np.float16("inf"))
    with loaded(path) as (weights, _):
        assert np.isfinite(weights.embeddings([6, 8])).all()
        with pytest.raises(ModelFormatError, match=r"tensor token_embd\.weight holds"):
            weights.embeddings([6, 7])


def test_great_weights_whose_sum_overflows_are_no_fault(tmp_path: Path) -> None:
    path = damaged(tmp_path, "F32", "output.weight", 0, np.full(200, 3e38, np.float32))
    with loaded(path) as (weights, file):
        np.testing.assert_array_equal(
            matrix_of(weights.panel(file.tensors["output.weight"]))[0, :200], np.float32(3e38)
        )


@pytest.mark.parametrize("missing", ["has_panel_format", "dequantizable"])
def test_a_type_without_kernels_is_named(path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels_module, missing, lambda quant_type: False)
    with (
        GGUFFile.open(path) as file,
        pytest.raises(UnsupportedModelError, match=r"no kernel for tensor \S+ of type"),
    ):
        PanelWeights(file, describe(file))


def damaged(folder: Path, quant_type: str, tensor: str, byte: int, value: np.generic | np.ndarray) -> Path:
    """A model with `value` written at `byte` of a tensor's data."""
    path = models.write_model(folder / "model.gguf", SPEC, quant_type)
    with GGUFFile.open(path) as file:
        offset = file.tensors[tensor].offset + byte
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.tobytes())
    return path
