"""The KV cache against a list of tokens."""

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.kv import KVCache

LAYERS = [(2, 4, 6), (1, 8, 2)]


def tokens(count: int, first: int, heads: int, length: int) -> torch.Tensor:
    return torch.arange(count * heads * length, dtype=torch.float32).reshape(count, heads, length) + 1000 * first


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 5), st.floats(0, 1)), max_size=12))
def test_holds_what_a_list_holds(actions: list[int | float]) -> None:
    """An integer appends so many tokens, a fraction truncates to that part of the length."""
    cache = KVCache(LAYERS, 64, dtype=torch.float32)
    kept: list[list[torch.Tensor]] = [[], []]
    for first, action in enumerate(actions):
        if isinstance(action, float):
            length = int(action * cache.length)
            cache.truncate(length)
            kept = [layer[:length] for layer in kept]
            continue
        for layer, (heads, key_length, value_length) in enumerate(LAYERS):
            new = tokens(action, first, heads, key_length)
            cache.append(layer, new, tokens(action, first, heads, value_length))
            kept[layer] += list(new)
    assert cache.length == len(kept[0])
    for layer in range(2):
        if kept[layer]:
            assert torch.equal(cache.keys(layer), torch.stack(kept[layer], dim=1))
        assert cache.keys(layer).shape == (LAYERS[layer][0], cache.length, LAYERS[layer][1])
        assert cache.values(layer).shape == (LAYERS[layer][0], cache.length, LAYERS[layer][2])


def test_views_from_a_token_on() -> None:
    cache = KVCache([(2, 4, 6)], 8, dtype=torch.float32)
    cache.append(0, tokens(5, 0, 2, 4), tokens(5, 0, 2, 6))
    assert torch.equal(cache.keys(0, 3), cache.keys(0)[:, 3:])
    assert torch.equal(cache.values(0, 3), cache.values(0)[:, 3:])


def test_length_is_what_all_layers_hold_and_truncation_undoes_half_a_pass() -> None:
    cache = KVCache(LAYERS, 8)
    cache.append(0, tokens(3, 0, 2, 4), tokens(3, 0, 2, 6))
    assert cache.length == 0
    cache.truncate(0)
    assert cache.keys(0).shape[1] == 0


def test_beyond_the_capacity_nothing_is_written() -> None:
    cache = KVCache(LAYERS, 4)
    cache.append(0, tokens(3, 0, 2, 4), tokens(3, 0, 2, 6))
    with pytest.raises(ValueError, match="5 tokens in a KV cache of 4"):
        cache.append(0, tokens(2, 0, 2, 4), tokens(2, 0, 2, 6))
    assert cache.keys(0).shape[1] == 3


@pytest.mark.parametrize("length", [-1, 1])
def test_truncation_is_within_the_length(length: int) -> None:
    with pytest.raises(ValueError, match="truncating"):
        KVCache(LAYERS, 4).truncate(length)


@pytest.mark.parametrize(("layers", "capacity"), [([], 4), (LAYERS, 0)])
def test_empty_caches_are_refused(layers: list[tuple[int, int, int]], capacity: int) -> None:
    with pytest.raises(ValueError, match="a KV cache of"):
        KVCache(layers, capacity)


def test_bytes_are_those_of_full_capacity() -> None:
    assert KVCache(LAYERS, 10).num_bytes == 10 * 2 * (2 * 10 + 10)
    assert KVCache(LAYERS, 10, dtype=torch.float32).num_bytes == 10 * 4 * (2 * 10 + 10)


def test_unfilled_memory_is_not_touched() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache([(8, 128, 128)], 1 << 17)
    cache.append(0, torch.ones(1, 8, 128), torch.ones(1, 8, 128))
    assert cache.num_bytes == 1 << 29
    assert process.memory_info().rss - before < 1 << 26
