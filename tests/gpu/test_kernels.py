"""Triton's kernels on a real GPU against torch's on the CPU. Run by themselves: `pytest -m gpu tests/gpu`."""

import os

import pytest
import torch

from gpu_kernels import torch_rows
from gpu_kernels.blocks import Lanes, Rotation
from gpu_kernels.decoding import DECODINGS
from gpu_kernels.dispatch import BUCKETS, Dispatch, kernels_for, why_no_triton
from gpu_kernels.kernels import Kernels
from gpu_kernels.matrix import GpuMatrix, arrange
from gpu_kernels.tiles import GpuTraits
from gpu_kernels.torch_kernels import TorchKernels
from tests.support.gpu_matrices import assert_close, normal, raw_rows
from tests.support.gpu_steps import KINDS, CacheShape, cache_on, fill, lanes_of, rotation_of, segments_of

pytestmark = pytest.mark.gpu
TORCH = TorchKernels()
TOLERANCES = {"few": 1e-5, "many": 2e-3, "decoded": 4e-3}


@pytest.fixture(scope="module")
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter is on for other tests: run tests/gpu by themselves")
    if reason := why_no_triton():
        pytest.skip(reason)
    return "cuda:0"


@pytest.fixture(scope="module")
def kernels(device: str) -> Kernels:
    return kernels_for(device)


def in_one_way(device: str, way: str) -> Kernels:
    from gpu_kernels.triton_kernels import TritonKernels, traits_of

    gpu: GpuTraits = traits_of(device)
    return TritonKernels(Dispatch(gpu, {(name, bucket): way for name in DECODINGS for bucket in BUCKETS}))


def pair_of(name: str, device: str, *leading: int) -> tuple[GpuMatrix, GpuMatrix]:
    """The same matrix on the CPU and on the GPU; arranged on each."""
    raw = torch.from_numpy(raw_rows(name, *leading, 1024 if DECODINGS[name].block_groups else 999))
    return arrange(raw, name), arrange(raw.to(device), name)


@pytest.mark.parametrize("way", TOLERANCES)
@pytest.mark.parametrize("name", DECODINGS)
def test_products(name: str, way: str, device: str) -> None:
    matrix, on_gpu = pair_of(name, device, 517)
    for tokens in (1, 3, 19, 130):
        x, wanted, found = normal(1, tokens, matrix.columns), torch.empty((tokens, 517)), normal(2, tokens, 517)
        TORCH.matmul(x, matrix, wanted)
        out = found.to(device)
        in_one_way(device, way).matmul(x.to(device), on_gpu, out)
        assert_close(out.cpu(), wanted, TOLERANCES[way])


@pytest.mark.parametrize("way", ["few", "many"])
@pytest.mark.parametrize("name", DECODINGS)
def test_tokens_of_a_step_get_the_same_bits_alone(name: str, way: str, device: str) -> None:
    _, matrix = pair_of(name, device, 517)
    x, chosen = normal(1, 32, matrix.columns).to(device), in_one_way(device, way)
    together, alone = (torch.empty((32, 517), device=device) for _ in range(2))
    chosen.matmul(x, matrix, together)
    for token in range(32):
        chosen.matmul(x[token : token + 1], matrix, alone[token : token + 1])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 300])
def test_attention_of_a_step_gives_the_same_bits_alone(kind: str, window: int | None, device: str) -> None:
    shape, each = CacheShape(kv_heads=2, key_length=64, value_length=64, kind=kind), 17
    lanes, blocks = lanes_of([1500, 700], shape.block_tokens)
    cache = shape.empty(blocks)
    fill(cache, lanes, 20)
    on_gpu = cache_on(cache, device)
    queries, chosen = normal(30, 2, each, 4 * 64).to(device), kernels_for(device)

    def computed(first: int, stop: int) -> torch.Tensor:
        part = Lanes(lanes.table.to(device), (lanes.lengths - (each - stop)).to(device))
        out = torch.empty((2 * (stop - first), 4 * 64), device=device)
        chosen.attention(queries[:, first:stop].flatten(0, 1), on_gpu, part, out, scale=0.3, window=window)
        return out.view(2, stop - first, -1)

    together = computed(0, each)
    for token in range(each):
        assert torch.equal(computed(token, token + 1), together[:, token : token + 1])


@pytest.mark.parametrize("counts", [[(2, 1), (0, 1)], [(1, 40), (2, 17), (0, 8)]])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "MXFP4"])
def test_products_of_experts(name: str, counts: list[tuple[int, int]], device: str, kernels: Kernels) -> None:
    matrix, on_gpu = pair_of(name, device, 4, 65)
    segments, pairs = segments_of(counts), sum(count for _, count in counts)
    x, wanted = normal(3, pairs, 1024), torch.empty((pairs, 65))
    TORCH.expert_matmul(x, matrix, segments, wanted)
    for chosen in (kernels, TORCH):
        out = torch.empty((pairs, 65), device=device)
        chosen.expert_matmul(x.to(device), on_gpu, segments.to(device), out)
        assert_close(out.cpu(), wanted, 2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lengths", "each"), [([1500], 1), ([300, 77, 1], 1), ([400], 130)])
@pytest.mark.parametrize("window", [None, 100])
def test_attention(lengths: list[int], each: int, window: int | None, kind: str, device: str, kernels: Kernels) -> None:
    shape = CacheShape(kv_heads=2, key_length=64, value_length=64, block_tokens=64, kind=kind)
    lanes, blocks = lanes_of(lengths, 64)
    cache = shape.empty(blocks)
    fill(cache, lanes, 4)
    queries, wanted = normal(5, len(lengths) * each, 512), torch.empty((len(lengths) * each, 512))
    TORCH.attention(queries, cache, lanes, wanted, scale=0.1, window=window)
    moved = cache_on(cache, device), Lanes(lanes.table.to(device), lanes.lengths.to(device))
    for chosen in (kernels, TORCH):
        out = torch.empty_like(wanted, device=device)
        chosen.attention(queries.to(device), *moved, out, scale=0.1, window=window)
        assert_close(out.cpu(), wanted, 2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_heads(kind: str, neighbours: bool, device: str, kernels: Kernels) -> None:
    shape = CacheShape(kv_heads=2, key_length=64, value_length=64, block_tokens=16, kind=kind)
    lanes, blocks = lanes_of([7, 5], 16)
    rotation, rows = rotation_of(9, 32, neighbours=neighbours), normal(6, 4, 512)
    positions, norm = torch.tensor([5, 6, 3, 4], dtype=torch.int32), normal(7, 64)
    cache, queries = shape.empty(blocks), rows[:, :256].clone()
    norms = {"query_norm": norm, "key_norm": norm, "eps": 1e-6}
    TORCH.heads(queries, rows[:, 256:384], rows[:, 384:], positions, rotation, cache, lanes, **norms)
    found, moved = rows[:, :256].to(device), rows.to(device)
    kernels.heads(
        *(found, moved[:, 256:384], moved[:, 384:], positions.to(device)),
        Rotation(rotation.cos.to(device), rotation.sin.to(device), neighbours),
        filled := cache_on(shape.empty(blocks), device),
        Lanes(lanes.table.to(device), lanes.lengths.to(device)),
        query_norm=norm.to(device),
        key_norm=norm.to(device),
        eps=1e-6,
    )
    assert_close(found.cpu(), queries, 1e-5)
    filled, every = cache_on(filled, "cpu"), torch.arange(blocks)
    for found, wanted in ((filled.keys, cache.keys), (filled.values, cache.values)):
        numbers = [torch_rows.read(rows, every).nan_to_num(0) for rows in (found, wanted)]
        assert_close(*numbers, {"f16": 1e-3, "bf16": 8e-3, "q8_0": 2e-2, "q4_0": 0.3}[kind])
    for found, wanted in zip(filled.values.parts, cache.values.parts, strict=True):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))  # what no product made is rounded alike


def test_rows(device: str, kernels: Kernels) -> None:
    x, delta, weight = normal(8, 5, 2048), normal(9, 5, 2048), normal(10, 2048)
    moved = [tensor.to(device) for tensor in (x, delta, weight)]
    wanted, found = torch.empty((5, 2048)), torch.empty((5, 2048), device=device)
    TORCH.add_norm(x, delta, weight, wanted, eps=1e-6)
    kernels.add_norm(*moved, found, eps=1e-6)
    assert_close(found.cpu(), wanted, 1e-5)
    for activation in ("silu", "gelu", "sigmoid", "relu2"):
        TORCH.gate(x, delta, wanted, activation=activation)
        kernels.gate(moved[0], moved[1], found, activation=activation)
        assert_close(found.cpu(), wanted, 1e-5)


def test_routes(device: str, kernels: Kernels) -> None:
    logits = torch.round(normal(11, 6, 128) * 2)
    ids, weights = torch.empty((6, 8), dtype=torch.int32), torch.empty((6, 8))
    found_ids, found = ids.to(device), weights.to(device)
    TORCH.route(logits, ids, weights, norm=True)
    kernels.route(logits.to(device), found_ids, found, norm=True)
    assert torch.equal(found_ids.cpu(), ids)
    assert_close(found.cpu(), weights, 1e-5)
