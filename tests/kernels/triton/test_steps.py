"""Triton's kernels besides products in its interpreter against torch's: attention, heads, routes, norms, rows."""

import pytest
import torch

from gpu_kernels import torch_rows
from gpu_kernels.blocks import Rotation
from gpu_kernels.dispatch import Dispatch
from gpu_kernels.tiles import GpuTraits
from gpu_kernels.torch_kernels import TorchKernels
from gpu_kernels.triton_kernels import TritonKernels
from tests.support.gpu_matrices import assert_close, normal
from tests.support.gpu_steps import KINDS, CacheShape, fill, lanes_of, rotation_of

TORCH = TorchKernels()
EXACT = 3e-6
HALF = 2e-3


def kernels(*, processors: int = 1, exact: bool = True) -> TritonKernels:
    return TritonKernels(Dispatch(GpuTraits(processors, 80)), is_exact=exact)


def attended(chosen: TritonKernels | TorchKernels, lengths: list[int], each: int, shape: CacheShape, **settings: float):
    lanes, blocks = lanes_of(lengths, shape.block_tokens)
    cache = shape.empty(blocks)
    fill(cache, lanes, 20)
    tokens = len(lengths) * each
    queries = normal(30, tokens, 6 * shape.key_length + 3)[:, 3:]
    out = torch.full((tokens, 6 * shape.value_length), torch.nan)
    chosen.attention(queries, cache, lanes, out, scale=0.3, **settings)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lengths", "each", "window", "softcap"),
    [([37], 9, None, None), ([70, 20, 1], 1, None, 3.0), ([45], 13, 5, None), ([33, 64], 2, 20, 5.0)],
)
def test_attention(kind: str, lengths: list[int], each: int, window: int | None, softcap: float | None) -> None:
    shape = CacheShape(kv_heads=2, key_length=24, value_length=20, kind=kind)
    settings = {"window": window, "softcap": softcap}
    wanted = attended(TORCH, lengths, each, shape, **settings)
    assert_close(attended(kernels(), lengths, each, shape, **settings), wanted, EXACT)
    assert_close(attended(kernels(exact=False), lengths, each, shape, **settings), wanted, HALF)


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("kinds", [("f16", "f16"), ("q8_0", "q4_0"), ("q4_0", "bf16")])
def test_attention_over_a_context_that_programs_share(window: int | None, kinds: tuple[str, str]) -> None:
    """Of heads whose rows are turned, if coded."""
    shape = CacheShape(1, 16, 64, block_tokens=32, kind=kinds[0], value_kind=kinds[1])
    wanted = attended(TORCH, [700, 90], 1, shape, window=window)
    assert_close(attended(kernels(processors=8), [700, 90], 1, shape, window=window), wanted, EXACT)


@pytest.mark.parametrize(("lengths", "each"), [([45], 2), ([700, 90], 1), ([40], 35)])
def test_parts_are_joined(lengths: list[int], each: int) -> None:
    """What is attended, with another part, one of whose tokens has seen nothing."""
    shape = CacheShape(kv_heads=2, key_length=24, value_length=20, block_tokens=32)
    tokens = each * len(lengths)
    part = torch.cat((normal(50, tokens, 126), normal(51, tokens, 6).abs() * 40), dim=1)
    part[-1, 120:] = torch.tensor([-1e30, 0.0]).repeat_interleave(6)
    logarithms = part[:, 120:126] + part[:, 126:].log()
    results = []
    for chosen in (TORCH, kernels(processors=8)):
        marks = torch.full((tokens, 12), torch.nan)
        out = attended(chosen, lengths, each, shape, marks=marks)
        joined = out.clone()
        chosen.join_parts(joined, marks, part)
        assert torch.equal(joined[-1], out[-1])
        whole = marks[:, :6] + marks[:, 6:].log()
        shares = torch.softmax(torch.stack((whole, logarithms)), 0)[..., None]
        wanted = out.view(tokens, 6, 20) * shares[0] + part[:, :120].view(tokens, 6, 20) * shares[1]
        assert_close(joined, wanted.flatten(1), EXACT)
        results.append((joined, whole))
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected, EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("neighbours", "pairs"), [(False, 5), (True, 3), (True, 5)])
@pytest.mark.parametrize("normed", [False, True])
def test_heads(kind: str, neighbours: bool, pairs: int, normed: bool) -> None:
    shape = CacheShape(kv_heads=2, key_length=10, value_length=6, block_tokens=4, kind=kind)
    lanes, blocks = lanes_of([7, 5], 4)
    rotation, rows = rotation_of(9, pairs, neighbours=neighbours), normal(17, 4, 40 + 20 + 12)
    norms = {"query_norm": normal(18, 10), "key_norm": normal(19, 10), "eps": 1e-6} if normed else {}
    positions = torch.tensor([5, 6, 3, 4], dtype=torch.int32)
    results = []
    for chosen in (TORCH, kernels()):
        cache, queries = shape.empty(blocks), rows[:, :40].clone()
        chosen.heads(queries, rows[:, 40:60], rows[:, 60:], positions, rotation, cache, lanes, **norms)
        results.append((queries, cache))
    (wanted, wanted_cache), (found, cache) = results
    assert_close(found, wanted, EXACT)
    for left, right in ((cache.keys, wanted_cache.keys), (cache.values, wanted_cache.values)):
        every = torch.arange(blocks)
        difference = (torch_rows.read(left, every).nan_to_num(-9) - torch_rows.read(right, every).nan_to_num(-9)).abs()
        assert (
            difference.max() <= {"f16": 2e-3, "bf16": 1.6e-2, "q8_0": 2.5e-2, "q4_0": 0.4}[kind]
        )  # a unit of the last


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key_length", "value_length"), [(64, 128), (8, 16), (80, 50)])
def test_rows_are_kept_to_the_bit(kind: str, key_length: int, value_length: int) -> None:
    """As torch's, of heads that are neither normed nor rotated; groups of zeros and of tiny numbers too."""
    shape = CacheShape(2, key_length, value_length, block_tokens=4, kind=kind)
    lanes, blocks = lanes_of([7], 4)
    keys, values = (normal(seed, 5, 2 * length) for seed, length in ((41, key_length), (42, value_length)))
    for rows in (keys, values):
        rows[0, :8], rows[1], rows[2] = 0, rows[1] * 1e-7, rows[2] * 100
    still = Rotation(torch.ones((9, key_length // 2)), torch.zeros((9, key_length // 2)), neighbours=False)
    positions = torch.arange(2, 7, dtype=torch.int32)
    caches = []
    for chosen in (TORCH, kernels()):
        caches.append(shape.empty(blocks))
        chosen.heads(torch.zeros((5, 4 * key_length)), keys, values, positions, still, caches[-1], lanes)
    block, place = lanes.table[0, positions // 4].long(), positions.long() % 4
    for wanted, found in zip(caches[0].parts, caches[1].parts, strict=True):
        assert torch.equal(wanted[block, place], found[block, place])


@pytest.mark.parametrize(("experts", "used"), [(5, 2), (64, 8), (33, 3)])
@pytest.mark.parametrize("norm", [False, True])
def test_routes(experts: int, used: int, norm: bool) -> None:
    logits = torch.round(normal(21, 4, experts) * 2)  # many are equal
    logits[3, 1] = torch.nan
    results = []
    for chosen in (TORCH, kernels()):
        ids, weights = torch.empty((4, used), dtype=torch.int32), torch.empty((4, used))
        chosen.route(logits, ids, weights, norm=norm, scale=2.5)
        results.append((ids, weights))
    assert torch.equal(results[0][0][:3], results[1][0][:3])
    assert_close(results[1][1][:3], results[0][1][:3], EXACT)
    assert results[1][1][3].isnan().all()
    assert (results[1][0] >= 0).all()
    assert (results[1][0] < experts).all()


def test_topk_is_torchs() -> None:
    logits, values, ids = normal(22, 2, 9), torch.empty((2, 3)), torch.empty((2, 3), dtype=torch.int32)
    kernels().topk(logits, values, ids)
    assert torch.equal(values, logits.topk(3).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_sums_and_gates(dtype: torch.dtype) -> None:
    x, delta = (normal(seed, 3, 75).to(dtype) for seed in (31, 32))
    weight, other, gate = normal(33, 75), normal(34, 75), normal(35, 3, 1)
    tolerance = EXACT if dtype == torch.float32 else HALF
    results = []
    for chosen in (TORCH, kernels()):
        out, total, collected = torch.empty_like(x), x.clone(), []
        chosen.rms_norm(x, weight[:25].contiguous(), out, eps=1e-5, heads=3)
        collected.append(out.clone())
        chosen.add_norm(total, delta, weight, out, eps=1e-5)
        collected.append(out.clone())
        chosen.add_norm(total, delta, weight, out, eps=1e-5, delta_weight=other)
        collected.append(out.clone())
        chosen.add(total, delta)
        chosen.add_gated(total, delta, gate)
        chosen.softcap(total, cap=3.0)
        chosen.scale_bias(total, scale=0.7, bias=weight)
        chosen.scale_bias(total, scale=1.5)
        collected.append(total)
        for activation in ("silu", "gelu", "sigmoid", "relu2"):
            chosen.gate(x * 4, delta, out, activation=activation)
            collected.append(out.clone())
        results.append(collected)
    for wanted, found in zip(*results, strict=True):
        assert_close(found, wanted, tolerance)


def test_rows_are_gathered_and_scattered() -> None:
    x, index = normal(36, 4, 130), torch.tensor([3, 0, 0, -1, 4, 2], dtype=torch.int32)
    token_of_pair = torch.arange(90, dtype=torch.int32) * 7 % 5
    y, weights = normal(37, 90, 130), normal(38, 90)
    y[81:] = torch.nan
    count = torch.tensor([81], dtype=torch.int32)
    results = []
    for chosen in (TORCH, kernels()):
        out, total = torch.empty((6, 130)), normal(39, 5, 130)
        chosen.gather_rows(x, index, out)
        chosen.scatter_add_weighted(total, y, weights, token_of_pair, count)
        results.append((out, total))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[1][1], results[0][1], EXACT)
