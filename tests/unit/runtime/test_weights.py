"""Weights as float32, kept decoded or as stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from offload.gguf import GGUFFile
from runtime import weights as weights_module
from runtime.architectures import describe
from runtime.weights import Weights
from tests.support import models

SPEC = models.Spec("qwen3moe", blocks=1, qk_norm="head", experts=4)


@contextmanager
def loaded(path: Path, *, resident: bool) -> Iterator[Weights]:
    with GGUFFile.open(path) as file:
        weights = Weights(file, describe(file), resident=resident, device=torch.device("cpu"))
        weights.load()
        yield weights


@pytest.fixture(scope="module", params=models.QUANT_TYPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "model.gguf", SPEC, request.param)


@pytest.mark.parametrize("resident", [True, False])
def test_every_tensor_is_what_the_gguf_package_reads(path: Path, resident: bool) -> None:
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with loaded(path, resident=resident) as weights, GGUFFile.open(path) as file:
        for name, tensor in file.tensors.items():
            expected = gguf.quants.dequantize(reference[name].data, reference[name].tensor_type)
            matrix = weights.matrix(tensor)
            assert matrix.dtype == torch.float32
            np.testing.assert_array_equal(matrix.numpy(), expected)
            for expert in range(tensor.num_experts):
                np.testing.assert_array_equal(weights.matrix(tensor, expert).numpy(), expected[expert])


@pytest.mark.parametrize("resident", [True, False])
def test_rows_and_products(path: Path, resident: bool) -> None:
    x = torch.randn(3, models.HIDDEN, generator=torch.Generator().manual_seed(1))
    with loaded(path, resident=resident) as weights, GGUFFile.open(path) as file:
        embedding = file.tensors["token_embd.weight"]
        assert torch.equal(weights.rows(embedding, [5, 0, 5]), weights.matrix(embedding)[[5, 0, 5]])
        stacked = file.tensors["blk.0.ffn_up_exps.weight"]
        torch.testing.assert_close(weights.product(x, stacked, 2), x @ weights.matrix(stacked)[2].T)
        torch.testing.assert_close(weights.product(x, embedding), x @ weights.matrix(embedding).T)


def test_both_ways_give_the_same_bits_in_any_number_of_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, models.HIDDEN, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(weights_module, "UNIT_WEIGHTS", 100 * models.HIDDEN)
    products = []
    for resident in (True, False):
        with loaded(path, resident=resident) as weights, GGUFFile.open(path) as file:
            products.append(weights.product(x, file.tensors["blk.0.ffn_up_exps.weight"], 1))
            assert products[-1].shape == (3, 256)
    assert torch.equal(*products)


def test_progress_counts_the_bytes_of_all_tensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "UNIT_WEIGHTS", 100 * models.HIDDEN)
    for resident in (True, False):
        heard: list[tuple[int, int]] = []
        with GGUFFile.open(path) as file:
            model = describe(file)
            weights = Weights(file, model, resident=resident, device=torch.device("cpu"))
            weights.load(lambda *counts, heard=heard: heard.append(counts))
            total = sum(tensor.num_bytes for _, tensor in model.tensors())
        assert heard[-1] == (total, total)
        assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_bytes_held(path: Path) -> None:
    with GGUFFile.open(path) as file:
        tensors = list(file.tensors.values())
    with loaded(path, resident=True) as weights:
        assert weights.num_bytes == sum(4 * tensor.num_elements for tensor in tensors)
    with loaded(path, resident=False) as weights:
        assert weights.num_bytes == sum(tensor.num_bytes for tensor in tensors)
