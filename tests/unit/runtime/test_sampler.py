"""The sampler against a slow, obvious reference, and its promises: exact penalties, seeds, positions."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from offload.errors import ModelFormatError, RequestError
from runtime.sampler import Sampler, SamplingParams, best_ids

EVERYTHING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def reference(logits: list[float], params: SamplingParams, history: list[int]) -> list[tuple[int, float]]:
    """Tokens and their chances, best first, one plain step after the other in the order of the chain."""
    values = dict(enumerate(logits))
    for token, bias in params.logit_bias.items():
        values[token] += bias
    last = params.penalty_last_n
    window = history if last < 0 else history[len(history) - min(last, len(history)) :]
    for token, count in Counter(window).items():
        factor = params.repetition_penalty
        values[token] = values[token] * factor if values[token] <= 0 else values[token] / factor
        values[token] -= count * params.frequency_penalty + params.presence_penalty
    order = sorted(values, key=lambda token: (-values[token], token))
    if params.temperature == 0:
        return [(order[0], 1.0)]
    if params.top_k:
        order = order[: params.top_k]
    peak = values[order[0]]
    total = sum(math.exp(values[token] - peak) for token in order)
    kept, reached = [], 0.0
    for token in order:
        kept.append(token)
        reached += math.exp(values[token] - peak) / total
        if params.top_p < 1 and reached >= params.top_p:
            break
    if params.min_p > 0:
        kept = [token for token in kept if values[token] - peak >= math.log(params.min_p)]
    weights = [math.exp((values[token] - peak) / params.temperature) for token in kept]
    return [(token, weight / sum(weights)) for token, weight in zip(kept, weights, strict=True) if weight > 0]


def row(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


# Quarters and eighths are exact in float32 and float64, so that ties are ties in both.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.0, 0.125, 0.8, 1.0, 3.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]),
    repetition=st.sampled_from([0.5, 1.0, 2.0]),
    presence=st.sampled_from([-0.5, 0.0, 1.5]),
    frequency=st.sampled_from([-0.25, 0.0, 0.5]),
    last_n=st.sampled_from([-1, 0, 1, 3, 64]),
    data=st.data(),
)
def test_distribution_equals_the_reference(
    *,
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
    presence: float,
    frequency: float,
    last_n: int,
    data: st.DataObject,
) -> None:
    tokens = st.integers(0, len(logits) - 1)
    history = data.draw(st.lists(tokens, max_size=8))
    bias = data.draw(st.dictionaries(tokens, st.sampled_from([-5.0, 0.5, 7.0]), max_size=3))
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition, presence, frequency, last_n, bias, seed=1)
    sampler = Sampler(params, len(logits), history)
    ids, probabilities = sampler.distribution(row(*logits), len(history))
    expected = reference(logits, params, history)
    assert ids.tolist() == [token for token, _ in expected]
    np.testing.assert_allclose(probabilities, [chance for _, chance in expected], rtol=1e-6)
    # The draw is the inverse of the cumulative distribution at the position's random number.
    bounds = np.cumsum([chance for _, chance in expected])
    drawn = ids.tolist().index(sampler.sample(row(*logits), len(history)).token_id)
    uniform = sampler.uniform(len(history))
    assert (bounds[drawn - 1] if drawn else 0.0) - 1e-6 <= uniform <= bounds[drawn] + 1e-6


def test_draws_follow_the_distribution() -> None:
    logits = row(0.0, 1.0, 2.0, -1.0, 1.5, -9.0)
    sampler = Sampler(SamplingParams(**{**EVERYTHING, "temperature": 1.3}, seed=7), len(logits), [0] * 4000)
    counts = Counter(sampler.sample(logits, position).token_id for position in range(4000))
    chances = dict(reference(logits.tolist(), sampler.params, []))
    observed = [counts[token] for token in range(6)]
    assert chisquare(observed, [4000 * chances[token] for token in range(6)]).pvalue > 0.001


def test_random_numbers_are_uniform_over_positions_and_seeds() -> None:
    by_position = [Sampler(SamplingParams(seed=3), 4).uniform(position) for position in range(3000)]
    by_seed = [Sampler(SamplingParams(seed=seed), 4).uniform(5) for seed in range(3000)]
    for numbers in (by_position, by_seed):
        assert min(numbers) >= 0 and max(numbers) < 1
        assert chisquare(np.histogram(numbers, bins=20, range=(0, 1))[0]).pvalue > 0.001


def test_the_order_of_positions_and_what_was_drawn_before_do_not_matter() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32)
    forward, backward = (Sampler(SamplingParams(seed=11), 300, [1] * 50) for _ in range(2))
    one = {position: forward.sample(rows[position], position) for position in range(50)}
    other = {position: backward.sample(rows[position], position) for position in reversed(range(50))}
    assert one == other
    assert len({sampled.token_id for sampled in one.values()}) > 10


def test_a_rejected_draft_leaves_no_trace() -> None:
    params = SamplingParams(seed=5, frequency_penalty=0.7, repetition_penalty=1.2)
    rows = np.random.default_rng(1).standard_normal((8, 50)).astype(np.float32)
    plain, drafted = Sampler(params, 50, [3, 4]), Sampler(params, 50, [3, 4])
    for position in range(2, 8):
        token = plain.sample(rows[position], position).token_id
        plain.accept(token)
        for wrong in (7, 7, 9):
            drafted.accept(wrong)
        assert drafted.sample(rows[position], position).token_id == token  # tokens after the position do not count
        drafted.truncate(position)
        drafted.accept(token)
    assert plain.num_tokens == drafted.num_tokens == 8


def test_same_seed_same_tokens_and_no_seed_a_random_one() -> None:
    logits = np.random.default_rng(2).standard_normal(200).astype(np.float32)
    drawn = [
        [Sampler(SamplingParams(seed=seed), 200, [0] * 30).sample(logits, p).token_id for p in range(30)]
        for seed in (1, 1, 2, -1, 2**64 - 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == drawn[4]  # seeds count modulo 2^64
    first, second = Sampler(SamplingParams(), 200), Sampler(SamplingParams(), 200)
    assert first.seed != second.seed
    again = Sampler(SamplingParams(seed=first.seed), 200)
    assert again.sample(logits, 0) == first.sample(logits, 0)


def test_greedy_takes_the_best_and_the_lowest_id_among_equals() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert Sampler(greedy, 5).sample(row(1, 3, 2, 3, 0), 0).token_id == 1
    assert Sampler(SamplingParams(temperature=0.0, logit_bias={3: 0.5}), 5).sample(row(1, 3, 2, 3, 0), 0).token_id == 3
    tiny = SamplingParams(**{**EVERYTHING, "temperature": 1e-300})
    assert Sampler(tiny, 3).sample(row(1, 5, 4), 0).token_id == 1


def test_greedy_leaves_the_logits_alone() -> None:
    logits = row(1, 2, 3)
    sampler = Sampler(SamplingParams(temperature=0.0, logit_bias={2: -100.0}, presence_penalty=1.0), 3, [1])
    assert sampler.sample(logits, 1).token_id == 0  # 2 - 1 ties with 1
    assert logits.tolist() == [1, 2, 3]


def test_penalties_are_exact() -> None:
    params = SamplingParams(
        **EVERYTHING, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, penalty_last_n=3
    )
    sampler = Sampler(params, 4, [3, 0, 0, 1])  # the 3 lies outside the last three
    ids, probabilities = sampler.distribution(row(2.0, -2.0, 0.0, 1.0), 4)
    penalized = {0: 2.0 / 2 - 2 * 0.5 - 0.25, 1: -2.0 * 2 - 0.5 - 0.25, 2: 0.0, 3: 1.0}
    total = sum(math.exp(value) for value in penalized.values())
    expected = {token: math.exp(value) / total for token, value in penalized.items()}
    assert dict(zip(ids.tolist(), probabilities.tolist(), strict=True)) == pytest.approx(expected)


def test_minus_infinity_forbids_a_token() -> None:
    params = SamplingParams(**EVERYTHING, logit_bias={0: -math.inf}, seed=0)
    sampler = Sampler(params, 2, [1] * 100)
    assert {sampler.sample(row(50, 0), position).token_id for position in range(100)} == {1}
    masked = Sampler(SamplingParams(**EVERYTHING, seed=0), 3, [0] * 200)
    drawn = {masked.sample(row(-np.inf, 0, 0), position).token_id for position in range(200)}
    assert drawn == {1, 2}


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = row(1.0, 2.0, 2.0, 0.0)
    params = SamplingParams(temperature=0.0, logit_bias={3: 50.0}, logprobs=3)
    sampled = Sampler(params, 4).sample(logits, 0)
    expected = logits - np.log(np.exp(logits).sum())
    assert sampled.token_id == 3
    assert sampled.logprob == pytest.approx(expected[3], abs=1e-6)
    assert [token for token, _ in sampled.top_logprobs] == [1, 2, 0]
    assert [value for _, value in sampled.top_logprobs] == pytest.approx(expected[[1, 2, 0]].tolist(), abs=1e-6)
    few = Sampler(SamplingParams(logprobs=20), 4).sample(logits, 0)
    assert len(few.top_logprobs) == 4


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0, -math.inf]), min_size=1, max_size=30), data=st.data()
)
def test_best_ids_are_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda i: -values[i])[:count]
    assert best_ids(row(*values), count).tolist() == expected


def test_a_large_vocabulary_is_drawn_from_exactly() -> None:
    logits = np.random.default_rng(4).standard_normal(131_072).astype(np.float32).round(2)
    sampler = Sampler(SamplingParams(**{**EVERYTHING, "top_k": 50}), len(logits))
    ids, _ = sampler.distribution(logits, 0)
    assert ids.tolist() == np.argsort(-logits, kind="stable")[:50].tolist()
    all_ids, probabilities = Sampler(SamplingParams(**EVERYTHING), len(logits)).distribution(logits, 0)
    assert all_ids.tolist() == np.argsort(-logits, kind="stable").tolist()
    assert probabilities.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [row(0, np.nan, 1), row(0, np.inf, 1), row(-np.inf, -np.inf, -np.inf)])
def test_broken_logits_are_refused(logits: NDArray[np.float32], temperature: float) -> None:
    with pytest.raises(ModelFormatError, match="position 0"):
        Sampler(SamplingParams(temperature=temperature), 3).sample(logits, 0)


def test_a_bias_that_forbids_everything_is_refused() -> None:
    params = SamplingParams(logit_bias={0: -math.inf, 1: -math.inf})
    with pytest.raises(RequestError, match="forbids every token"):
        Sampler(params, 2).sample(row(0, 1), 0)


def test_misuse_raises_value_errors() -> None:
    sampler = Sampler(SamplingParams(), 4, [1, 2])
    calls: list[Any] = [
        lambda: Sampler(SamplingParams(), 4, [4]),
        lambda: sampler.accept(-1),
        lambda: sampler.truncate(3),
        lambda: sampler.sample(row(0, 0, 0, 0), 3),
        lambda: sampler.sample(row(0, 0, 0), 2),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()
