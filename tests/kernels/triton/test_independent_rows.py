"""In Triton's interpreter: in steps a token gets the same bits whatever tokens are beside it. Layouts: test_ptx.py."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gpu_kernels.blocks import Lanes
from gpu_kernels.decoding import DECODINGS
from gpu_kernels.dispatch import BUCKETS, Dispatch
from gpu_kernels.matrix import arrange
from gpu_kernels.tiles import STEP_COLUMNS, GpuTraits
from gpu_kernels.triton_kernels import TritonKernels
from tests.support.gpu_matrices import normal, raw_rows
from tests.support.gpu_steps import KINDS, CacheShape, fill, lanes_of, segments_of


def kernels(way: str, *, exact: bool = False, processors: int = 4) -> TritonKernels:
    table = {(name, bucket): way for name in DECODINGS for bucket in BUCKETS}
    return TritonKernels(Dispatch(GpuTraits(processors, 80), table), is_exact=exact)


def check_parts(compute: Callable[[int, int], torch.Tensor], tokens: int) -> None:
    whole = compute(0, tokens)
    for first, stop in ((0, 1), (tokens - 1, tokens), (1, 4), (2, tokens)):
        assert torch.equal(compute(first, stop), whole[first:stop])


@pytest.fixture(autouse=True)
def _dots_like_those_of_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's are numpy's, whose sums depend on where a row stands; a GPU's do not."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return (a.astype(dtype)[:, :, None] * b.astype(dtype)[None]).sum(1)

    monkeypatch.setattr("triton.runtime.interpreter.np.matmul", matmul)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16"])
@pytest.mark.parametrize(("way", "exact"), [("few", False), ("many", False), ("many", True)])
def test_products(name: str, way: str, exact: bool) -> None:
    matrix = arrange(torch.from_numpy(raw_rows(name, 9, 768)), name)
    x, bias = normal(1, 19, 768), normal(2, 9)

    def compute(first: int, stop: int) -> torch.Tensor:
        out = torch.empty((stop - first, 9))
        kernels(way, exact=exact).matmul(x[first:stop], matrix, out, bias=bias, scale=0.7)
        return out

    check_parts(compute, 19)


def test_experts() -> None:
    matrix = arrange(torch.from_numpy(raw_rows("Q4_0", 3, 5, 96)), "Q4_0")
    x, out, alone = normal(3, 90, 96), torch.empty((90, 5)), torch.empty((90, 5))
    kernels("few").expert_matmul(x, matrix, segments_of([(2, 50), (0, 40)]), out)
    for pair in (0, 1, 49, 50, 89):
        one = segments_of([(2 if pair < 50 else 0, 1), (1, 0), (1, 0)])
        kernels("few").expert_matmul(x[pair : pair + 1], matrix, one, alone[pair : pair + 1])
        assert torch.equal(alone[pair], out[pair])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 40])
def test_attention(kind: str, window: int | None) -> None:
    """A context that two programs share, beside a longer one."""
    shape, each = CacheShape(kv_heads=2, key_length=16, value_length=16, kind=kind), 9
    lanes, blocks = lanes_of([263, 300], shape.block_tokens)
    cache = shape.empty(blocks)
    fill(cache, lanes, 20)
    queries = normal(30, 2, each, 4 * 16)

    def compute(first: int, stop: int, rows: slice = slice(0, 2)) -> torch.Tensor:
        lengths = lanes.lengths[rows] - (each - stop)
        part = queries[rows, first:stop].flatten(0, 1)
        out = torch.empty((len(part), 4 * 16))
        kernels("few").attention(part, cache, Lanes(lanes.table[rows], lengths), out, scale=0.3, window=window)
        return out.view(-1, stop - first, 4 * 16).transpose(0, 1)

    check_parts(compute, each)
    assert torch.equal(compute(0, each, slice(0, 1)), compute(0, each)[:, :1])


def test_pairs_are_added_one_by_one() -> None:
    y, weights = normal(1, 70, 37), normal(2, 70)
    token_of_pair = torch.arange(70, dtype=torch.int32) * 7 % 15
    whole = torch.zeros((15, 37))
    kernels("few").scatter_add_weighted(whole, y, weights, token_of_pair, torch.tensor([70], dtype=torch.int32))
    for token in range(15):
        own, alone = token_of_pair == token, torch.zeros((1, 37))
        count = torch.tensor([int(own.sum())], dtype=torch.int32)
        pairs = torch.zeros(int(count), dtype=torch.int32)
        kernels("few").scatter_add_weighted(alone, y[own], weights[own], pairs, count)
        assert torch.equal(alone[0], whole[token])


def test_steps_are_longer_than_verified_drafts() -> None:
    assert STEP_COLUMNS >= 17
