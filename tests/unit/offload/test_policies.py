"""Policies of the cache of experts: which one goes, what they learn, and how long they take."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from offload.policies import Policy, PolicyName, Uses, make_policy
from offload.routing_trace import RoutingTrace
from offload.synthetic_trace import synthetic_trace
from offload.trace_replay import belady, replay


def _ids(*experts: int) -> NDArray[np.int64]:
    return np.array(experts, np.int64)


def _run(name: PolicyName, shape: tuple[int, int], *passes: tuple[int, tuple[int, ...]]) -> tuple[Policy, Uses]:
    """A policy that was told of these (layer, experts)."""
    uses = Uses.none(*shape)
    policy = make_policy(name, uses)
    for layer, experts in passes:
        uses.note(layer, _ids(*experts))
        policy.used(layer, _ids(*experts), None)
    return policy, uses


def test_lru_lets_the_one_go_that_was_not_used_for_longest():
    policy, _ = _run(PolicyName.LRU, (2, 3), (0, (0, 1)), (1, (2,)), (0, (0,)))
    values = policy.values(0)
    assert values[0, 2] < values[0, 1] < values[1, 2] < values[0, 0]


def test_lfu_lets_the_one_go_that_was_used_least_and_of_equals_the_older():
    policy, _ = _run(PolicyName.LFU, (1, 4), (0, (0, 1)), (0, (0, 2)), (0, (3,)), (0, (3,)))
    values = policy.values(0)[0]
    assert values[1] < values[2] < values[0] < values[3]


def test_score_is_the_moving_average_of_router_probabilities():
    uses = Uses.none(2, 3)
    policy = make_policy(PolicyName.SCORE, uses)
    policy.used(0, _ids(0, 2), np.array([0.8, 0.2], np.float32))
    policy.used(0, _ids(2, 1), np.array([0.6, 0.4], np.float32))
    np.testing.assert_allclose(policy.values(0), [[0.2, 0.2, 0.35], [0, 0, 0]], rtol=1e-6)


def test_score_without_probabilities_gives_equal_parts():
    policy, _ = _run(PolicyName.SCORE, (1, 4), (0, (0, 3)))
    np.testing.assert_allclose(policy.values(0), [[0.25, 0, 0, 0.25]])


def test_least_stale_knows_which_layer_comes_next():
    """All experts are used in every pass: those of the layer that comes last of all are worth least."""
    everything = (0, 1, 2)
    policy, _ = _run(PolicyName.LEAST_STALE, (4, 3), *((layer, everything) for layer in (0, 1, 2, 3, 0, 1)))
    by_layer = policy.values(1)[:, 0]
    assert by_layer.tolist() == [-3.0, -4.0, -1.0, -2.0]
    assert (policy.values(1) == by_layer[:, None]).all()


def test_least_stale_prefers_popular_experts_where_few_are_used():
    passes = [(layer, (0, 1 + token % 7)) for token in range(40) for layer in range(2)]
    values = _run(PolicyName.LEAST_STALE, (2, 16), *passes)[0].values(1)
    assert (values[:, 0] > values[:, 1:].max(axis=1)).all()
    assert (values[:, 1:8].min(axis=1) > values[:, 8:].max(axis=1)).all()


def test_least_stale_learns_how_soon_experts_are_used_again():
    """Popularity is even; only whether the last token's experts come back differs."""
    orders = []
    for reuse in (0.0, 0.7):
        trace = synthetic_trace(2, 32, 4, 300, zipf_exponent=0.0, reuse=reuse, seed=3)
        uses = Uses.none(2, 32)
        policy = make_policy(PolicyName.LEAST_STALE, uses)
        for token in trace.topk_ids.astype(np.int64):
            for layer, experts in enumerate(token):
                uses.note(layer, experts)
                values = policy.values(layer)
        last = trace.topk_ids[-1, 0]
        rank = np.argsort(np.argsort(values[0]))  # 31 is kept longest
        orders.append(float(rank[last].mean()))
    assert orders[1] == 29.5
    assert orders[0] < 26


def test_uses_fade_only_where_a_policy_wants_it():
    passes = [(0, (0,))] * 200
    for name in PolicyName:
        policy, uses = _run(name, (1, 2), *passes)
        policy.values(0)
        assert (uses.counts[0, 0] < 200) == (name is PolicyName.LEAST_STALE)


@pytest.mark.parametrize("name", PolicyName)
def test_values_are_finite_before_anything_is_known(name):
    policy = make_policy(name, Uses.none(3, 5))
    assert np.isfinite(policy.values(2)).all()
    policy, _ = _run(name, (3, 5), (1, (4,)))
    assert np.isfinite(policy.values(1)).all()


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(PolicyName),
    calls=st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 5), min_size=1), st.booleans()), max_size=60),
)
def test_values_are_finite_in_whatever_order_layers_come(name, calls):
    """A run that was broken off begins again at the first layer; layers that lack nothing ask for no values."""
    uses = Uses.none(4, 6)
    policy = make_policy(name, uses)
    for layer, experts, lacks in calls:
        uses.note(layer, _ids(*experts), len(experts))
        policy.used(layer, _ids(*experts), None)
        if lacks:
            values = policy.values(layer)
            assert values.shape == (4, 6)
            assert np.isfinite(values).all()


def _scan(layers: int, experts: int, times: int) -> RoutingTrace:
    ids = np.broadcast_to(np.arange(experts, dtype=np.int16), (times, layers, experts))
    return RoutingTrace("scan", experts, ids.copy(), np.zeros(1, np.int64))


@pytest.mark.parametrize("slots", [64, 96, 128, 192])
def test_a_scan_of_all_experts_hits_in_proportion_to_the_slots(slots):
    """Prefill in chunks: every expert of every layer, again and again; 256 in all, 32 needed at a time."""
    trace = _scan(8, 32, 20)
    assert replay(trace, slots, PolicyName.LRU).hits == 0
    result = replay(trace, slots, PolicyName.LEAST_STALE, warm_up_tokens=10)
    assert result.hit_rate >= 0.95 * (slots - 32) / (256 - 32)
    assert result.hits <= belady(trace, slots, warm_up_tokens=10).hits


@pytest.mark.parametrize("reuse", [0.0, 0.5])
@pytest.mark.parametrize("zipf_exponent", [0.0, 0.5, 1.0])
def test_least_stale_is_close_to_the_best_of_the_others(zipf_exponent, reuse):
    trace = synthetic_trace(6, 32, 4, 400, zipf_exponent=zipf_exponent, reuse=reuse, seed=5)
    for slots in (48, 96, 144):
        rates = {name: replay(trace, slots, name, warm_up_tokens=100).hit_rate for name in PolicyName}
        assert rates[PolicyName.LEAST_STALE] > max(rates.values()) - 0.02, (slots, rates)


@pytest.mark.parametrize("name", PolicyName)
def test_values_of_a_large_model_take_a_fraction_of_a_layer(name):
    """The median of 48 layers of 128 experts; 20 us on a quiet machine, and a bound for a busy one."""
    uses = Uses.none(48, 128)
    policy = make_policy(name, uses)
    random = np.random.default_rng(0)
    seconds = []
    for number in range(480):
        experts = random.choice(128, 8, replace=False)
        uses.note(number % 48, experts)
        policy.used(number % 48, experts, None)
        start = time.perf_counter()
        policy.values(number % 48)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 200e-6
