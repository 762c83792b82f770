"""What the descriptions of generated files of every architecture say."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from offload.errors import ModelFormatError, UnsupportedModelError
from offload.gguf import GGUFFile
from runtime.architectures import ARCHITECTURES, Model, describe
from runtime.architectures.base import Activation, QKNorm, RopeOrder, RopeScaling
from tests.support import models


def described(path: Path, spec: models.Spec, quant_type: str = "F32") -> Model:
    models.write_model(path, spec, quant_type)
    with GGUFFile.open(path) as file:
        return describe(file)


@pytest.fixture(scope="module")
def all_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    path = tmp_path_factory.mktemp("models") / "model.gguf"
    return {name: described(path, spec) for name, spec in {**models.FAMILIES, **models.VARIANTS}.items()}


def test_every_architecture_is_generated() -> None:
    assert {spec.architecture for spec in models.FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.VARIANTS])
def test_every_tensor_has_one_place(name: str, all_models: dict[str, Model]) -> None:
    spec = models.spec_of(name)
    model = all_models[name]
    placed = [tensor.name for _, tensor in model.tensors()]
    assert sorted(placed) == sorted(models.tensors(spec))
    assert model.is_tied == spec.tied
    assert model.block_count == len(model.layers) == spec.blocks
    assert model.vocab_size == models.VOCAB
    assert (model.expert_count, model.expert_used_count) == (
        (spec.experts, spec.experts_used) if spec.experts else (0, 0)
    )
    for layer in model.layers:
        for attribute, tensor in layer.tensors():
            stem = attribute.removesuffix("_bias").removesuffix("_scale")
            ending = attribute[len(stem) + 1 :] or "weight"
            assert tensor.name == f"blk.{layer.index}.{stem}.{ending}"


def test_rope_orders(all_models: dict[str, Model]) -> None:
    orders = {name: model.rope.order for name, model in all_models.items()}
    assert {name for name in orders if orders[name] is RopeOrder.NORM} == {
        name for name, model in all_models.items() if model.architecture == "llama"
    }


def test_scalings(all_models: dict[str, Model]) -> None:
    linear, yarn = all_models["llama-linear"].rope, all_models["qwen2-yarn"].rope
    assert (linear.scaling, linear.factor) == (RopeScaling.LINEAR, 4.0)
    assert (yarn.scaling, yarn.factor, yarn.original_context_length) == (RopeScaling.YARN, 4.0, 64)
    assert (yarn.attn_factor, yarn.beta_fast, yarn.beta_slow) == (1.25, 32.0, 1.0)
    long, short = all_models["phi3-long"].rope, all_models["phi3-short"].rope
    assert long.factors(33) is long.rope_factors_long
    assert long.factors(32) is long.rope_factors_short
    assert short.dimension_count == 48
    assert all_models["llama-3"].rope.factors(1) is all_models["llama-3"].rope.rope_freqs


def test_gemma3(all_models: dict[str, Model]) -> None:
    model = all_models["gemma3"]
    assert [layer.sliding_window for layer in model.layers] == [16] * 5 + [None]
    assert [layer.rope.freq_base for layer in model.layers] == [10000.0] * 5 + [1e6]
    assert [layer.rope.factor for layer in model.layers] == [1.0] * 5 + [8.0]
    assert (model.embedding_scale, model.activation, model.qk_norm) == (16.0, Activation.GELU, QKNorm.HEAD)
    pattern = all_models["gemma3-pattern"]
    assert [layer.sliding_window for layer in pattern.layers] == [7, None, None, 7]
    assert pattern.layers[0].rope.freq_base == 500.0
    assert pattern.logit_softcap == 5.0
    assert [layer.sliding_window for layer in all_models["gemma3-global"].layers] == [None, None]


def test_gemma3_of_62_blocks_scales_attention_by_the_share_of_the_embedding(tmp_path: Path) -> None:
    spec = models.Spec("gemma3", blocks=62, heads=2, kv_heads=1, key_length=32, ffn=32, qk_norm="head", post_norms=True)
    assert described(tmp_path / "model.gguf", spec).attention_scale == pytest.approx(128**-0.5)
    fewer = described(tmp_path / "model.gguf", replace(spec, blocks=6))
    assert fewer.attention_scale == pytest.approx(32**-0.5)


def test_a_number_as_gemma3s_pattern(tmp_path: Path) -> None:
    spec = models.changed(models.VARIANTS["gemma3-pattern"], {"attention.sliding_window_pattern": 2})
    assert [layer.sliding_window for layer in described(tmp_path / "model.gguf", spec).layers] == [7, None, 7, None]


def test_experts(all_models: dict[str, Model]) -> None:
    norms = {name: model.experts.weights_norm for name, model in all_models.items() if model.experts}
    assert {name for name, norm in norms.items() if not norm} == {"qwen2moe", "olmoe"}
    assert all_models["qwen2moe"].experts is not None
    assert all_models["qwen2moe"].experts.shared_feed_forward_length == 256


def test_the_width_of_qwens_experts_is_split_where_it_is_not_given(tmp_path: Path) -> None:
    given = {"expert_feed_forward_length": None, "feed_forward_length": 512}
    spec = models.changed(models.Spec("qwen3moe", blocks=1, qk_norm="head", experts=4), given)
    model = described(tmp_path / "model.gguf", spec)
    assert model.experts is not None
    assert model.experts.feed_forward_length == 256


def test_arrays_that_say_the_same_for_each_block(tmp_path: Path) -> None:
    arrays = {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2], "feed_forward_length": [256, 256]}
    model = described(tmp_path / "model.gguf", models.changed(models.FAMILIES["llama"], arrays))
    assert (model.head_count, model.head_count_kv, model.feed_forward_length) == (4, 2, 256)


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    absent = dict.fromkeys(("attention.head_count_kv", "rope.freq_base", "rope.dimension_count"))
    model = described(tmp_path / "model.gguf", models.changed(models.Spec("llama", kv_heads=4), absent))
    assert (model.head_count_kv, model.rope.freq_base, model.rope.dimension_count) == (4, 10000.0, 64)
    assert model.rope.original_context_length == model.context_length


def test_the_older_key_of_linear_scaling(tmp_path: Path) -> None:
    model = described(tmp_path / "model.gguf", models.changed(models.FAMILIES["llama"], {"rope.scale_linear": 2.0}))
    assert (model.rope.scaling, model.rope.factor) == (RopeScaling.LINEAR, 2.0)


def test_no_scaling_ignores_the_factor(tmp_path: Path) -> None:
    keys = {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}
    assert described(tmp_path / "model.gguf", models.changed(models.FAMILIES["llama"], keys)).rope.factor == 1.0


def test_unknown_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        GGUFFile.open(tmp_path / "model.gguf") as file,
        pytest.raises(UnsupportedModelError, match=r"'mamba9' is not supported; known: bitnet, gemma3, llama") as error,
    ):
        describe(file)
    assert error.value.hint is not None
    assert "--engine llama.cpp" in error.value.hint


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vocabulary = models.add_spm_vocabulary
    monkeypatch.setattr(models, "add_spm_vocabulary", lambda writer, size: write_vocabulary(writer, size + 1))
    with pytest.raises(ModelFormatError, match="384 rows for a vocabulary of 385 tokens"):
        described(tmp_path / "model.gguf", models.FAMILIES["llama"])


def test_an_unknown_quant_type_is_named(tmp_path: Path) -> None:
    """Q8_K is known by size but is not a type for weights at rest, type 200 is not known at all."""
    path = tmp_path / "model.gguf"
    models.write_model(path, models.Spec("llama", blocks=1))
    data = bytearray(path.read_bytes())
    entry = data.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight")
    data[entry + 20 : entry + 24] = (200).to_bytes(4, "little")  # after the number of dimensions and two of them
    path.write_bytes(data)
    with (
        GGUFFile.open(path) as file,
        pytest.raises(UnsupportedModelError, match=r"type 200 of tensor blk\.0\.ffn_down\.weight is not supported"),
    ):
        describe(file)


def test_a_vector_may_be_written_as_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors_of = models.tensors

    def with_a_row(spec: models.Spec) -> dict[str, tuple[tuple[int, ...], float | None]]:
        return tensors_of(spec) | {"blk.0.ffn_gate_inp_shexp.weight": ((1, models.HIDDEN), None)}

    monkeypatch.setattr(models, "tensors", with_a_row)
    model = described(tmp_path / "model.gguf", models.FAMILIES["qwen2moe"])
    assert model.layers[0].ffn_gate_inp_shexp is not None
