"""Splits of a layer's experts between GPU and CPU, against all that are possible."""

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.expert_rates import DeviceTime, ExpertRates, ExpertTimes
from offload.expert_schedule import (
    CHOOSING_S,
    IMPROVED_EXPERTS,
    misses_to_move,
    moving_saves_s,
    schedule_experts,
)

MOST = 8
ONE = ExpertTimes(DeviceTime(1, 0, 0), DeviceTime(1, 0, 0), 1.0)


def makespan(
    gpu: Sequence[int], cpu: Sequence[int], tokens: list[int], on_gpu: list[bool], times: ExpertTimes
) -> float:
    """By walking both devices' lists."""
    gpu_s = moved_s = 0.0
    for index in gpu:
        if not on_gpu[index]:
            moved_s += times.move_s
            gpu_s = max(gpu_s, moved_s)
        gpu_s += float(times.gpu.seconds(tokens[index]))
    return max(gpu_s, sum(float(times.cpu.seconds(tokens[index])) for index in cpu))


def optimum(tokens: list[int], on_gpu: list[bool], times: ExpertTimes) -> float:
    """Over all splits. Own experts first, then those of most tokens: no order of the GPU's part is better (Johnson)."""
    count, best = len(tokens), float("inf")
    for mask in range(1 << count):
        gpu = sorted((i for i in range(count) if mask >> i & 1), key=lambda i: (not on_gpu[i], -tokens[i]))
        best = min(best, makespan(gpu, [i for i in range(count) if not mask >> i & 1], tokens, on_gpu, times))
    return best


def linear(gpu: tuple[float, float], cpu: tuple[float, float], move_s: float) -> ExpertTimes:
    """(seconds at once, seconds a token) of each device."""
    return ExpertTimes(DeviceTime(gpu[0], 0, gpu[1]), DeviceTime(cpu[0], 0, cpu[1]), move_s)


def some_layer(chance: random.Random) -> tuple[list[int], list[bool], ExpertTimes]:
    """A layer of up to 8 experts on a machine of any kind."""
    count, resident = chance.randint(1, MOST), chance.choice([0.2, 0.5, 0.8])
    tokens = [chance.choice([1, 1, 1, 2, 3, 5, 8, 20, 64]) for _ in range(count)]
    times = linear(
        (10 ** chance.uniform(-5.5, -3.5), 10 ** chance.uniform(-7, -5)),
        (10 ** chance.uniform(-4.5, -2.5), 10 ** chance.uniform(-5, -3.5)),
        10 ** chance.uniform(-4.5, -2.5),
    )
    return tokens, [chance.random() < resident for _ in range(count)], times


def test_within_a_tenth_of_the_optimum() -> None:
    chance = random.Random(6)
    ratios = []
    for _ in range(600):
        tokens, on_gpu, times = some_layer(chance)
        ratios.append(schedule_experts(tokens, on_gpu, times).makespan_s / optimum(tokens, on_gpu, times))
    assert max(ratios) <= 1.1
    assert sum(ratio > 1.0 + 1e-9 for ratio in ratios) < 0.05 * len(ratios)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=IMPROVED_EXPERTS + 4),
    st.tuples(*5 * [st.floats(1e-6, 1e-2)]),
)
def test_every_expert_is_computed_once_and_the_makespan_is_true(
    experts: list[tuple[int, bool]], figures: tuple[float, ...]
) -> None:
    tokens, on_gpu = [count for count, _ in experts], [there for _, there in experts]
    times = linear(figures[:2], figures[2:4], figures[4])  # type: ignore[arg-type]
    split = schedule_experts(tokens, on_gpu, times)
    assert sorted(split.gpu + split.cpu) == list(range(len(experts)))
    assert split.moved == tuple(index for index in split.gpu if not on_gpu[index])
    assert split.makespan_s == pytest.approx(makespan(split.gpu, split.cpu, tokens, on_gpu, times))
    everything = range(len(experts))
    order = sorted(everything, key=lambda index: (not on_gpu[index], -tokens[index]))
    assert split.makespan_s <= makespan((), everything, tokens, on_gpu, times) + 1e-12
    assert split.makespan_s <= makespan(order, (), tokens, on_gpu, times) + 1e-12


def test_many_experts() -> None:
    chance = random.Random(7)
    tokens = [chance.randint(1, 40) for _ in range(128)]
    on_gpu = [chance.random() < 0.3 for _ in range(128)]
    times = linear((5e-5, 1e-6), (4e-4, 2e-5), 1.5e-4)
    split = schedule_experts(tokens, on_gpu, times)
    gpu_tokens = [tokens[index] for index in split.gpu if on_gpu[index]]
    assert all(first >= second for first, second in pairwise(gpu_tokens))
    total = sum(float(times.cpu.seconds(count)) for count in tokens)
    assert split.makespan_s < 0.5 * total
    assert split.makespan_s >= makespan((), split.cpu, tokens, on_gpu, times)


def test_extremes() -> None:
    assert schedule_experts([], [], ONE).makespan_s == 0.0
    slow_link = linear((1e-6, 0), (1e-3, 0), 1.0)
    split = schedule_experts([1, 1, 1], [True, False, False], slow_link)
    assert (split.gpu, split.moved) == ((0,), ())
    free_link = linear((1e-6, 0), (1e-3, 0), 0.0)
    assert schedule_experts([1, 1, 1], [True, False, False], free_link).cpu == ()
    with pytest.raises(ValueError, match="2 experts, and 1 places"):
        schedule_experts([1, 2], [True], ONE)


@pytest.mark.parametrize(
    ("misses", "link", "cpu", "moved"),
    [(0, 6, 24, 0), (8, 6, 24, 1), (1, 6, 24, 0), (1, 24, 6, 1), (4, 0, 24, 0), (3, 6, 6, 1)],
)
def test_a_split_by_bandwidth(misses: int, link: float, cpu: float, moved: int) -> None:
    assert misses_to_move(misses, link, cpu) == moved


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 64), st.floats(1e8, 1e11), st.floats(1e8, 1e11))
def test_no_split_by_bandwidth_is_better(misses: int, link: float, cpu: float) -> None:
    def seconds(moved: int) -> float:
        return max(moved / link, (misses - moved) / cpu)

    best = min(seconds(moved) for moved in range(misses + 1))
    assert seconds(misses_to_move(misses, link, cpu)) <= best * (1 + 1e-9)


def test_rates_that_are_none() -> None:
    for figures in ((-1, 1.0, 1.0), (1, -1.0, 1.0), (1, 1.0, 0.0)):
        with pytest.raises(ValueError, match="bytes per second"):
            misses_to_move(*figures)


def test_copies_for_one_token_must_save_what_choosing_them_takes() -> None:
    slow_link = ExpertTimes(DeviceTime(1e-5, 0, 0), DeviceTime(0, 0, 1e-4), move_s=9e-4)
    assert moving_saves_s(8, slow_link) == pytest.approx(-CHOOSING_S)
    fast_link = ExpertTimes(DeviceTime(1e-5, 0, 0), DeviceTime(0, 0, 1e-3), move_s=1e-3)
    assert moving_saves_s(8, fast_link) == pytest.approx(4e-3 - CHOOSING_S)


def test_times_follow_from_rates() -> None:
    times = ExpertRates(1e9, 1e10, 1e11, 1e12, 5e9, launch_s=1e-5).times(10**6, 2 * 10**6)
    assert times.move_s == pytest.approx(2e-4)
    assert times.read_s == 0.0
    assert times.cpu.seconds(np.array([1, 100])) == pytest.approx([1e-3, 4e-2])
    assert times.gpu.seconds(np.array([1, 100])) == pytest.approx([2e-5, 4e-4 + 1e-5])
