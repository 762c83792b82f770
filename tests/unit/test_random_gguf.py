"""Random model files: the tensor mix of a file type, and files that load."""

import pytest

from offload.gguf import GGUFFile
from runtime.architectures import describe
from scripts.random_gguf import SHAPES, random_blocks, tensors, type_of, write_model


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_known_architecture(name):
    names = [tensor for tensor, _ in tensors(SHAPES[name])]
    assert len(names) == len(set(names))
    assert SHAPES[name].architecture in ("llama", "olmoe", "bitnet", "qwen3moe")


def test_the_mix_is_the_quantisers():
    assert type_of("token_embd.weight", (2048, 128256), "llama1b", "Q4_K_M").name == "Q6_K"
    assert type_of("blk.0.attn_v.weight", (2048, 512), "llama1b", "Q4_K_M").name == "Q6_K"
    assert type_of("blk.2.attn_v.weight", (2048, 512), "llama1b", "Q4_K_M").name == "Q4_K"
    assert type_of("blk.2.attn_norm.weight", (2048,), "llama1b", "Q4_K_M").name == "F32"
    assert type_of("token_embd.weight", (2048, 128256), "llama1b", "F16").name == "F16"


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "file_type"), [("llama1b", "TQ1_0"), ("bitnet2b", "TQ2_0")])
def test_a_file_of_one_layer_loads(shape, file_type, tmp_path):
    path = tmp_path / "random.gguf"
    total = write_model(path, shape, file_type, layers=1)
    with GGUFFile.open(path) as gguf:
        assert sum(tensor.num_bytes for tensor in gguf.tensors.values()) == total
        assert describe(gguf).vocab_size == SHAPES[shape].vocabulary


def test_ternary_blocks_hold_no_fourth_code():
    import numpy as np

    from cpu_kernels.quant_types import quant_type
    from cpu_kernels.reference.dequantize import dequantize

    blocks = random_blocks(np.random.default_rng(0), quant_type("TQ2_0"), 66 * 100)
    values = dequantize(np.ascontiguousarray(blocks), quant_type("TQ2_0"))
    assert len(np.unique(values)) == 3
