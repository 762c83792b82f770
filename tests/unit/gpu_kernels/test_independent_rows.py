"""What torch's kernels give a token is the same to the bit whatever tokens are beside it, and wherever it stands."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_kernels import torch_kernels, torch_products
from gpu_kernels.blocks import Lanes
from gpu_kernels.kernels import ACTIVATIONS
from gpu_kernels.layouts import LAYOUTS, layout
from gpu_kernels.matrix import arrange
from gpu_kernels.torch_kernels import TorchKernels
from gpu_kernels.torch_products import sums_alike
from tests.support.gpu_matrices import normal, raw_rows
from tests.support.gpu_steps import KINDS, CacheShape, fill, lanes_of, rotation_of, segments_of

KERNELS = TorchKernels()
BOUNDS = st.tuples(st.integers(0, 33), st.integers(0, 33)).map(sorted).filter(lambda pair: pair[0] < pair[1])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_parts(whole: torch.Tensor, compute, bounds: tuple[int, int]) -> None:
    """`compute(first, stop)` is those rows of `whole`."""
    first, stop = bounds
    part = compute(first, stop)
    assert torch.equal(part.contiguous().view(torch.uint8), whole[first:stop].contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(bounds=BOUNDS, rows=st.integers(1, 40), blocks=st.integers(1, 3), adds=st.booleans(), half=st.booleans())
def test_products(name: str, bounds: tuple[int, int], rows: int, blocks: int, adds: bool, half: bool) -> None:
    columns = blocks * layout(name).block_size if layout(name).block_size > 1 else 37 * blocks
    matrix = arrange(torch.from_numpy(raw_rows(name, rows, columns)), name)
    x, bias, before = normal(1, 33, columns), normal(2, rows), normal(3, 33, rows)
    x = x.half() if half else x

    def compute(first: int, stop: int) -> torch.Tensor:
        out = before[first:stop].clone()
        KERNELS.matmul(x[first:stop], matrix, out, adds=adds, scale=0.7, bias=bias)
        return out

    check_parts(compute(0, 33), compute, bounds)


@pytest.mark.parametrize(("rows", "columns"), [(300, 1536), (1000, 4096), (65, 2049)])
def test_wide_products(rows: int, columns: int) -> None:
    matrix = arrange(torch.from_numpy(raw_rows("F16", rows, columns)), "F16")
    x = normal(1, 65, columns)

    def compute(first: int, stop: int) -> torch.Tensor:
        out = torch.empty((stop - first, rows))
        KERNELS.matmul(x[first:stop], matrix, out)
        return out

    whole = compute(0, 65)
    for bounds in ((0, 1), (33, 34), (64, 65), (3, 12), (0, 17), (20, 53)):
        check_parts(whole, compute, bounds)


def test_where_sums_differ_rows_are_multiplied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_products, "sums_alike", lambda *_: False)
    monkeypatch.setattr("gpu_kernels.torch_attention.sums_alike", lambda *_: False)
    matrix = arrange(torch.from_numpy(raw_rows("Q4_K", 9, 512)), "Q4_K")
    x, one, all_ = normal(1, 5, 512), torch.empty((1, 9)), torch.empty((5, 9))
    KERNELS.matmul(x, matrix, all_)
    KERNELS.matmul(x[3:4], matrix, one)
    assert torch.equal(one[0], all_[3])
    check_attention([40], (2, 5), None, None, "f16")


def test_equal_rows_that_are_summed_differently_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.Tensor.__matmul__

    def uneven(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found = original(x, weights)
        found[..., -1, :] = original(x.flip(-1), weights.flip(-2))[..., -1, :]
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", uneven)
    assert not sums_alike.__wrapped__(torch.device("cpu"), 16, 333, 20)
    assert not sums_alike.__wrapped__(torch.device("cpu"), 16, 333, 20, 2)


@pytest.mark.parametrize("way", ["_experts_one_by_one", "_experts_pair_by_pair", "_experts_of_all_pairs"])
def test_experts_whatever_their_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, x, scales = raw_rows("Q5_0", 4, 50, 96), normal(6, 40, 96), normal(7, 9)
    matrix = arrange(torch.from_numpy(raw), "Q5_0")
    alone = torch.empty((40, 50))
    for pair, slot in enumerate([2] * 20 + [0] * 1 + [3] * 19):
        segment = torch.tensor([[slot, 0, 1, 5]], dtype=torch.int32)
        KERNELS.expert_matmul(x[pair : pair + 1], matrix, segment, alone[pair : pair + 1], scales=scales)
    monkeypatch.setattr(torch_kernels, "_experts_one_by_one", getattr(torch_kernels, way))
    out, segments = torch.empty((40, 50)), segments_of([(2, 20), (0, 1), (3, 19)])
    segments[:, 3] = 5
    KERNELS.expert_matmul(x, matrix, segments, out, scales=scales)
    assert torch.equal(out, alone)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(bounds=BOUNDS, columns=st.integers(1, 200), offset=st.integers(0, 5), activation=st.sampled_from(ACTIVATIONS))
def test_rows_of_activations(bounds: tuple[int, int], columns: int, offset: int, activation: str) -> None:
    """Slices of wider tensors too."""
    wide, weight, delta = normal(1, 33, columns + 9) * 3, normal(2, columns), normal(3, 33, columns)
    gates = normal(4, 33, 1) * 4

    def compute(first: int, stop: int) -> torch.Tensor:
        x, total = wide[first:stop, offset : offset + columns], delta[first:stop].clone()
        outs = [torch.empty_like(total) for _ in range(3)]
        KERNELS.rms_norm(x, weight, outs[0], eps=1e-6)
        KERNELS.add_norm(total, x, weight, outs[1], eps=1e-6, delta_weight=weight)
        KERNELS.gate(x, delta[first:stop], outs[2], activation=activation)
        capped = x.clone()
        KERNELS.softcap(capped, cap=2.5)
        KERNELS.add_gated(total, x, gates[first:stop])
        KERNELS.scale_bias(total, scale=1.3, bias=weight)
        return torch.cat((total, capped, *outs), dim=1)

    check_parts(compute(0, 33), compute, bounds)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(bounds=BOUNDS, experts=st.integers(2, 150), used=st.integers(1, 8), norm=st.booleans())
def test_routes(bounds: tuple[int, int], experts: int, used: int, norm: bool) -> None:
    logits, used = normal(1, 33, experts) * 3, min(used, experts)

    def compute(first: int, stop: int) -> torch.Tensor:
        ids, weights = torch.empty((stop - first, used), dtype=torch.int32), torch.empty((stop - first, used))
        KERNELS.route(logits[first:stop], ids, weights, norm=norm, scale=1.7)
        values, top = torch.empty((stop - first, used)), torch.empty((stop - first, used), dtype=torch.int32)
        KERNELS.topk(logits[first:stop], values, top)
        return torch.cat((ids.float(), weights, values, top.float()), dim=1)

    check_parts(compute(0, 33), compute, bounds)


def test_pairs_are_added_in_their_order_whatever_is_between_them() -> None:
    y, weights = normal(1, 60, 37), normal(2, 60)
    token_of_pair = torch.arange(60, dtype=torch.int32) * 7 % 15
    whole = torch.zeros((15, 37))
    KERNELS.scatter_add_weighted(whole, y, weights, token_of_pair, torch.tensor([60], dtype=torch.int32))
    for token in range(15):
        own = token_of_pair == token
        alone, count = torch.zeros((1, 37)), torch.tensor([int(own.sum())], dtype=torch.int32)
        KERNELS.scatter_add_weighted(alone, y[own], weights[own], torch.zeros(int(count), dtype=torch.int32), count)
        assert torch.equal(alone[0], whole[token])


def check_attention(
    lengths: list[int], bounds: tuple[int, int], window: int | None, softcap: float | None, kind: str
) -> None:
    """Some of the last tokens at once, then others; in lanes of one token, too."""
    shape = CacheShape(kv_heads=2, key_length=24, value_length=10, kind=kind)
    lanes, blocks = lanes_of(lengths, shape.block_tokens)
    cache = shape.empty(blocks)
    fill(cache, lanes, 20)
    first, stop = bounds
    each, heads = min(lengths), 6
    queries = normal(30, len(lengths), each, heads * 24)

    def compute(first: int, stop: int) -> torch.Tensor:
        """Tokens each - first and so on of every lane, the lane ending there."""
        part = Lanes(lanes.table, lanes.lengths - (each - stop))
        rows = queries[:, first:stop].flatten(0, 1)
        out = torch.empty((len(rows), heads * 10))
        KERNELS.attention(rows, cache, part, out, scale=0.3, window=window, softcap=softcap)
        return out.view(len(lengths), stop - first, -1)

    whole = compute(0, each)
    assert torch.equal(compute(first, stop), whole[:, first:stop])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    bounds=BOUNDS,
    context=st.integers(33, 700),
    second=st.none() | st.integers(33, 400),
    window=st.none() | st.integers(1, 300),
    softcap=st.sampled_from([None, 3.0]),
    kind=st.sampled_from(KINDS),
)
def test_attention(
    bounds: tuple[int, int], context: int, second: int | None, window: int | None, softcap: float | None, kind: str
) -> None:
    lengths = [context] if second is None else [context, second]
    check_attention(lengths, bounds, window, softcap, kind)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_heads(neighbours: bool, kind: str) -> None:
    shape = CacheShape(kv_heads=2, key_length=10, value_length=6, block_tokens=4, kind=kind)
    rows, norms, rotation = (
        normal(17, 9, 72),
        (normal(18, 10), normal(19, 10)),
        rotation_of(9, 4, neighbours=neighbours),
    )

    def compute(first: int, stop: int, cache) -> torch.Tensor:
        part = rows[first:stop].clone()
        lanes = Lanes(torch.arange(3, dtype=torch.int32)[None], torch.tensor([stop], dtype=torch.int32))
        positions = torch.arange(first, stop, dtype=torch.int32)
        parts = part[:, :40], part[:, 40:60], part[:, 60:]
        KERNELS.heads(*parts, positions, rotation, cache, lanes, query_norm=norms[0], key_norm=norms[1], eps=1e-6)
        return part[:, :40]

    caches = [shape.empty(3) for _ in range(2)]
    for cache in caches:
        for part in cache.parts:
            part.zero_()
    whole = compute(0, 9, caches[0])
    for first, stop in ((0, 1), (1, 6), (6, 9)):
        assert torch.equal(compute(first, stop, caches[1]), whole[first:stop])
    for one, other in zip(caches[0].parts, caches[1].parts, strict=True):
        assert torch.equal(one, other)
