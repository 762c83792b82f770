"""Units of a model: every tensor once, and what one token reads of each."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ModelFormatError, PlanError
from offload.gguf import GGUFFile
from planner.model_shape import ModelShape, UnitKind
from runtime.models import DEMO_MODEL
from tests.support.planning import HeaderOnly, header


def test_dense_model_has_the_parts_of_each_layer_in_order() -> None:
    shape = ModelShape.from_gguf(header(layers=2, tied=False))
    assert [unit.name for unit in shape.units] == [
        "embedding",
        "blk.0.attention",
        "blk.0.dense_ffn",
        "blk.1.attention",
        "blk.1.dense_ffn",
        "output",
    ]
    attention = shape.units[1]
    assert attention.tensors[0] == "blk.0.attn_norm.weight"
    assert (attention.num_matmuls, attention.num_vectors) == (4, 1)
    assert attention.active_bytes == attention.num_bytes
    assert "blk.0.ffn_norm.weight" in shape.units[2].tensors


def test_experts_are_active_by_the_share_that_is_used() -> None:
    shape = ModelShape.from_gguf(header(layers=1, experts=8, used=2, shared=True))
    units = {unit.kind: unit for unit in shape.units}
    experts = units[UnitKind.EXPERTS]
    assert experts.num_weights == 3 * 8 * 512 * 256
    assert experts.active_weights == 3 * 2 * 512 * 256
    assert experts.active_bytes == experts.num_bytes // 4
    assert experts.num_matmuls == 6
    assert units[UnitKind.ROUTER].tensors == ("blk.0.ffn_norm.weight", "blk.0.ffn_gate_inp.weight")
    assert units[UnitKind.SHARED_EXPERT].num_weights == 512 * 256
    assert shape.active_parameters < shape.num_parameters


def test_experts_in_tensors_of_their_own_are_one_unit() -> None:
    model = header(layers=1)
    shapes = {name: (t.quant_type.name, t.shape) for name, t in model.tensors.items() if ".ffn_up." not in name}
    shapes |= {f"blk.0.ffn_up.{expert}.weight": ("Q8_0", (512, 256)) for expert in range(4)}
    metadata = dict(model.metadata) | {"llama.expert_count": 4, "llama.expert_used_count": 1}
    experts = next(
        unit for unit in ModelShape.from_gguf(HeaderOnly(metadata, shapes)).units if unit.kind is UnitKind.EXPERTS
    )
    assert experts.active_weights == 512 * 256
    assert experts.num_matmuls == 1


def test_embedding_is_read_by_the_row_and_a_tied_one_again_as_output() -> None:
    tied = ModelShape.from_gguf(header(vocab=1000, width=256))
    embedding, output = tied.units[0], tied.units[-1]
    assert (embedding.num_weights, embedding.active_weights) == (256_000, 256)
    assert (output.num_weights, output.active_weights, output.num_matmuls) == (256, 256_256, 1)
    assert tied.tied_output
    own = ModelShape.from_gguf(header(vocab=1000, width=256, tied=False))
    assert own.units[-1].num_weights == 256_256
    assert own.active_weights == tied.active_weights
    assert tied.active_parameters == tied.num_parameters - 256_000 + 256 + 256_000 - 256_000
    assert own.vocab_size == tied.vocab_size == 1000


def test_kv_bytes_follow_heads_and_lengths() -> None:
    model = header(layers=3, width=256, heads=4, kv_heads=2)
    assert ModelShape.from_gguf(model).kv_bytes_per_token == 3 * 2 * 2 * (64 + 64)
    model.metadata["llama.attention.key_length"] = 128  # type: ignore[index]
    assert ModelShape.from_gguf(model).kv_bytes_per_layer == (2 * 2 * (128 + 64),) * 3
    model.metadata["llama.attention.head_count_kv"] = np.array([2, 0, 1], np.int32)  # type: ignore[index]
    assert ModelShape.from_gguf(model).kv_bytes_per_layer == (768, 0, 384)


def test_per_layer_counts_must_be_one_a_layer() -> None:
    model = header(layers=3)
    model.metadata["llama.attention.head_count_kv"] = np.array([2, 2], np.int32)  # type: ignore[index]
    with pytest.raises(ModelFormatError, match=r"head_count_kv must hold 3 counts"):
        ModelShape.from_gguf(model)


def test_more_experts_used_than_there_are_is_refused() -> None:
    with pytest.raises(ModelFormatError, match="expert_used_count"):
        ModelShape.from_gguf(header(experts=4, used=5))


def test_a_vocabulary_alone_cannot_be_placed() -> None:
    with pytest.raises(PlanError, match="holds a vocabulary alone") as caught:
        ModelShape.from_gguf(HeaderOnly({"general.architecture": "llama"}, {}))
    assert caught.value.hint is not None
    assert "tokenize" in caught.value.hint


def test_tensors_of_unknown_use_are_counted() -> None:
    model = header(layers=1)
    shapes = {name: (t.quant_type.name, t.shape) for name, t in model.tensors.items()}
    shapes |= {"rope_freqs.weight": ("F32", (32,)), "blk.0.ssm_conv1d.weight": ("F32", (4, 32))}
    shape = ModelShape.from_gguf(HeaderOnly(dict(model.metadata), shapes))
    kinds = {tensor: unit.kind for unit in shape.units for tensor in unit.tensors}
    assert kinds["rope_freqs.weight"] is UnitKind.OTHER
    assert kinds["blk.0.ssm_conv1d.weight"] is UnitKind.ATTENTION


@given(
    layers=st.integers(0, 4),
    experts=st.sampled_from([0, 1, 8]),
    tied=st.booleans(),
    weights=st.sampled_from(["F32", "F16", "Q8_0", "Q4_K", "IQ2_XXS"]),
)
def test_every_tensor_is_in_exactly_one_unit(layers: int, experts: int, tied: bool, weights: str) -> None:
    model = header(layers=layers, experts=experts, used=min(experts, 2), tied=tied, weights=weights)
    shape = ModelShape.from_gguf(model)
    names = [name for unit in shape.units for name in unit.tensors]
    assert sorted(names) == sorted(model.tensors)
    assert shape.num_bytes == sum(tensor.num_bytes for tensor in model.tensors.values())
    assert shape.num_parameters == sum(count for _, count in shape.weights_by_type)
    for unit in shape.units:
        assert 0 <= unit.active_bytes == sum(num_bytes for _, num_bytes in unit.active_bytes_by_type)
        if unit.kind is not UnitKind.OUTPUT:
            assert unit.active_weights <= unit.num_weights


def test_demo_model(shared_data: Path) -> None:
    with GGUFFile.open(shared_data / "models" / "demo" / "strata-demo-moe-Q8_0.gguf") as gguf:
        shape = ModelShape.from_gguf(gguf)
    assert (shape.expert_count, shape.expert_used_count, shape.vocab_size) == (16, 2, 4096)
    assert shape.num_bytes < gguf.byte_size
    assert {unit.kind for unit in shape.units} == {
        UnitKind.EMBEDDING,
        UnitKind.ATTENTION,
        UnitKind.ROUTER,
        UnitKind.EXPERTS,
        UnitKind.OUTPUT,
    }


def test_merges_are_counted_where_a_vocabulary_has_them() -> None:
    with GGUFFile.open(DEMO_MODEL) as gguf:
        assert ModelShape.from_gguf(gguf).merge_count == len(gguf.get_strings("tokenizer.ggml.merges")) > 1000
    assert ModelShape.from_gguf(header()).merge_count == 0
