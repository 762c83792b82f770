"""The operations on torch against formulas written down plainly, and what they refuse."""

import pytest
import torch

from gpu_kernels import torch_attention, torch_products, torch_rows
from gpu_kernels.layouts import LAYOUTS
from gpu_kernels.matrix import arrange
from gpu_kernels.torch_kernels import TorchKernels
from runtime.executor import layers
from tests.support.gpu_matrices import assert_close, normal, raw_rows, weights_of
from tests.support.gpu_steps import KINDS, CacheShape, fill, lanes_of, rotation_of, segments_of

KERNELS = TorchKernels()
TOLERANCES = {"f16": 1e-3, "bf16": 8e-3, "q8_0": 5e-3, "q4_0": 8e-2}


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_of_every_type(name: str) -> None:
    raw = raw_rows(name, 5, 512)
    x, out = normal(1, 3, 512), torch.empty((3, 5))
    KERNELS.matmul(x, arrange(torch.from_numpy(raw), name), out)
    assert_close(out, x @ weights_of(raw, name).T, 1e-6)


def test_products_scale_add_and_write_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_products._WEIGHTS_AT_ONCE, "cpu", 130)  # two rows at a time
    raw = raw_rows("Q8_0", 5, 64)
    weights, bias = weights_of(raw, "Q8_0"), normal(2, 5)
    wide, target = normal(3, 3, 80), normal(4, 3, 9)
    x, out, before = wide[:, 8:72], target[:, 2:7], target.clone()
    KERNELS.matmul(x, arrange(torch.from_numpy(raw), "Q8_0"), out, adds=True, scale=0.5, bias=bias)
    assert_close(out, before[:, 2:7] + x @ weights.T * 0.5 + bias, 1e-6)
    assert torch.equal(target[:, :2], before[:, :2])
    assert torch.equal(target[:, 7:], before[:, 7:])


def test_half_activations() -> None:
    raw = raw_rows("Q4_K", 6, 256)
    x, out = normal(5, 2, 256).half(), torch.empty((2, 6), dtype=torch.float16)
    KERNELS.matmul(x, arrange(torch.from_numpy(raw), "Q4_K"), out)
    assert torch.equal(out, (x.float() @ weights_of(raw, "Q4_K").T).half())


@pytest.mark.parametrize("way", ["_experts_one_by_one", "_experts_pair_by_pair", "_experts_of_all_pairs"])
def test_expert_products(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_kernels import torch_kernels

    monkeypatch.setattr(torch_kernels, "_experts_one_by_one", getattr(torch_kernels, way))
    raw = raw_rows("Q5_0", 4, 6, 64)
    weights = weights_of(raw, "Q5_0")
    x, out, scales = normal(6, 9, 64), torch.full((9, 6), 7.0), normal(7, 5)
    segments = segments_of([(2, 3), (0, 1), (3, 4)])
    KERNELS.expert_matmul(x, arrange(torch.from_numpy(raw), "Q5_0"), segments, out, scales=scales)
    wanted = torch.full((9, 6), 7.0)
    for slot, first, pairs, expert in segments.tolist():
        wanted[first : first + pairs] = x[first : first + pairs] @ weights[slot].T * scales[expert]
    assert_close(out, wanted, 1e-6)
    assert (out[8] == 7).all()


def test_rows_are_gathered_and_scattered() -> None:
    x, out = normal(8, 4, 6), torch.empty((5, 6))
    KERNELS.gather_rows(x, torch.tensor([3, 0, 0, -1, 4], dtype=torch.int32), out)
    assert torch.equal(out, torch.stack([x[3], x[0], x[0], torch.zeros(6), torch.zeros(6)]))
    y, weights, total = normal(9, 5, 6), normal(10, 5), normal(11, 3, 6)
    y[3:] = torch.nan
    token_of_pair = torch.tensor([2, 0, 2, 1, 1], dtype=torch.int32)
    wanted = total.clone()
    for pair in range(3):
        wanted[token_of_pair[pair]] += weights[pair] * y[pair]
    KERNELS.scatter_add_weighted(total, y, weights, token_of_pair, torch.tensor([3], dtype=torch.int32))
    assert_close(total, wanted, 1e-6)


def test_norms_sums_and_gates() -> None:
    x, delta, weight, other = normal(12, 3, 24), normal(13, 3, 24), normal(14, 24), normal(15, 24)
    out = torch.empty((3, 24))
    KERNELS.rms_norm(x, weight[:8], out, eps=1e-5, heads=3)
    assert_close(out, layers.rms_norm(x.view(3, 3, 8), weight[:8], 1e-5).flatten(1), 1e-6)
    for delta_weight in (None, other):
        total = x.clone()
        KERNELS.add_norm(total, delta, weight, out, eps=1e-5, delta_weight=delta_weight)
        wanted = x + (delta if delta_weight is None else layers.rms_norm(delta, other, 1e-5))
        assert_close(total, wanted, 1e-6)
        assert_close(out, layers.rms_norm(wanted, weight, 1e-5), 1e-6)
    total, gate = x.clone(), normal(16, 3, 1)
    KERNELS.add(total, delta)
    KERNELS.add_gated(total, delta, gate)
    assert_close(total, x + delta + delta * torch.sigmoid(gate), 1e-6)
    KERNELS.softcap(total, cap=2.0)
    assert total.abs().max() <= 2
    KERNELS.scale_bias(total, scale=2.0)
    KERNELS.scale_bias(total, bias=weight)
    assert_close(total, 4 * torch.tanh((x + delta + delta * torch.sigmoid(gate)) / 2) + weight, 1e-6)
    for activation, function in (("silu", torch.nn.functional.silu), ("relu2", lambda v: v.clamp_min(0) ** 2)):
        KERNELS.gate(x, delta, out, activation=activation)
        assert_close(out, function(x) * delta, 1e-6)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_normed_turned_and_appended(neighbours: bool, kind: str) -> None:
    shape = CacheShape(kv_heads=2, key_length=10, value_length=6, block_tokens=4, kind=kind)
    lanes, blocks = lanes_of([7, 5], 4)
    cache, rotation = shape.empty(blocks), rotation_of(9, 4, neighbours=neighbours)
    rows = normal(17, 4, 40 + 20 + 12)
    queries, keys, values = rows[:, :40].clone(), rows[:, 40:60], rows[:, 60:]
    norms = normal(18, 10), normal(19, 10)
    positions = torch.tensor([5, 6, 3, 4], dtype=torch.int32)
    KERNELS.heads(
        queries, keys, values, positions, rotation, cache, lanes, query_norm=norms[0], key_norm=norms[1], eps=1e-6
    )
    turn = layers.rotate_neighbours if neighbours else layers.rotate_halves
    angles = rotation.cos[positions.long()][:, None], rotation.sin[positions.long()][:, None]
    wanted = turn(layers.rms_norm(rows[:, :40].view(4, 4, 10), norms[0], 1e-6), *angles)
    assert_close(queries, wanted.flatten(1), 1e-6)
    new_keys = turn(layers.rms_norm(keys.view(4, 2, 10), norms[1], 1e-6), *angles)
    for token, (lane, position) in enumerate(((0, 5), (0, 6), (1, 3), (1, 4))):
        place = int(lanes.table[lane, position // 4]), position % 4
        block, tolerance = torch.tensor(place[:1]), TOLERANCES[kind]
        held_key, held_value = (torch_rows.read(part, block)[0, place[1]] for part in (cache.keys, cache.values))
        assert_close(held_key, new_keys[token], tolerance)
        assert_close(held_value, values.reshape(4, 2, 6)[token], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_turned_heads_are_attended_as_they_were(kind: str) -> None:
    """Queries and keys turn alike, and what is attended is turned back."""
    shape = CacheShape(kv_heads=1, key_length=64, value_length=32, kind=kind)
    lanes, blocks = lanes_of([40], 16)
    cache, rotation, rows = shape.empty(blocks), rotation_of(40, 32, neighbours=True), normal(3, 40, 2 * 64 + 64 + 32)
    queries, keys, values = rows[:, :128].clone(), rows[:, 128:192], rows[:, 192:]
    plain = [torch_attention.rotate(x.view(40, -1, 64), torch.arange(40), rotation) for x in (queries, keys)]
    wanted = layers.attention(plain[0], plain[1].transpose(0, 1), values[None], scale=0.1)
    KERNELS.heads(queries, keys, values, torch.arange(40, dtype=torch.int32), rotation, cache, lanes)
    out = torch.empty((40, 64))
    KERNELS.attention(queries, cache, lanes, out, scale=0.1)
    assert_close(out, wanted.flatten(1), 2 * TOLERANCES[kind])
    if kind.startswith("q"):
        assert not torch.allclose(queries, plain[0].flatten(1))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_stay_so(kind: str, damage: float) -> None:
    cache = CacheShape(kv_heads=1, key_length=64, value_length=40, kind=kind).empty(1)
    new = normal(1, 2, 1, 40)
    new[1, 0, 35] = damage
    torch_rows.put(cache.values, torch.zeros(2, dtype=torch.int64), torch.arange(2), new)
    held = torch_rows.read(cache.values, torch.zeros(1, dtype=torch.int64))[0, :2, 0]
    assert held[0].isfinite().all()
    assert held[1, :32].isfinite().all()
    assert not held[1, 32:].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lengths", "each"), [([37], 9), ([37, 20, 1], 1), ([16], 16), ([600, 300], 20)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0)])
def test_attention(kind: str, lengths: list[int], each: int, window: int | None, softcap: float | None) -> None:
    shape = CacheShape(kv_heads=2, key_length=8, value_length=6, kind=kind)
    lanes, blocks = lanes_of(lengths, shape.block_tokens)
    cache = shape.empty(blocks)
    keys, values = fill(cache, lanes, 20)
    queries, out = normal(30, len(lengths) * each, 6 * 8), torch.empty((len(lengths) * each, 6 * 6))
    KERNELS.attention(queries, cache, lanes, out, scale=0.3, window=window, softcap=softcap)
    for lane, length in enumerate(lengths):
        rows = slice(lane * each, (lane + 1) * each)
        held = keys[lane, :length].transpose(0, 1), values[lane, :length].transpose(0, 1)
        wanted = layers.attention(queries[rows].view(each, 6, 8), *held, scale=0.3, window=window, softcap=softcap)
        assert_close(out[rows], wanted.flatten(1), 2e-6)


def test_routes_prefer_lower_ids_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, torch.inf, 0.0, 0.0, 0.0]])
    ids, weights = torch.empty((3, 2), dtype=torch.int32), torch.empty((3, 2))
    KERNELS.route(logits, ids, weights, norm=True, scale=3.0)
    assert ids[:2].tolist() == [[1, 2], [0, 1]]
    assert_close(weights[:2], torch.full((2, 2), 1.5), 1e-6)
    assert weights[2].isnan().all()
    KERNELS.route(logits, ids, weights, norm=False)
    assert_close(weights[:2], torch.softmax(logits[:2], -1).gather(1, ids[:2].long()), 1e-6)
    values, top = torch.empty((3, 3)), torch.empty((3, 3), dtype=torch.int32)
    KERNELS.topk(logits, values, top)
    assert top.tolist() == [[1, 2, 4], [0, 1, 2], [1, 0, 2]]
    assert values[0].tolist() == [3, 3, 3]
