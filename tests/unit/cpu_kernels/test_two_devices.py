"""Items shared out between two devices: the loops that compiled code runs, against what they are told to find."""

import random
from itertools import product

import numpy as np
import pytest

from cpu_kernels.two_devices import best_beginning, from_both_ends, improve, makespan

NOTHING_READ = np.ones(3, np.bool_)


def test_moves_and_reads_follow_each_other() -> None:
    costs = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.0, 3.0, 3.0]])
    assert makespan(np.array([True, True, True]), costs, NOTHING_READ, 0.0) == 7.0  # two moves, and the last item
    assert makespan(np.array([True, False, False]), costs, NOTHING_READ, 0.0) == 4.0
    in_memory = np.array([True, False, False])
    assert makespan(np.array([True, False, False]), costs, in_memory, 5.0) == 12.0  # two reads, and the last item
    assert makespan(np.array([True, True, False]), costs, in_memory, 5.0) == 12.0  # both read, and end together


def test_whoever_is_done_earlier_takes_the_next() -> None:
    is_firsts = np.zeros(3, np.bool_)
    from_both_ends(is_firsts, np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.0, 0.0, 9.0]]))
    assert is_firsts.tolist() == [True, True, False]


def test_as_many_of_the_beginning_as_are_best() -> None:
    costs = np.array([[1.0, 1.0, 1.0], [4.0, 1.0, 9.0], [0.0, 0.0, 0.0]])
    is_firsts = np.ones(3, np.bool_)
    best_beginning(is_firsts, np.array([2, 0, 1]), costs, NOTHING_READ, 0.0)
    assert is_firsts.tolist() == [True, False, True]


def test_nothing_that_is_moved_or_exchanged_improves_what_was_improved() -> None:
    chance = random.Random(3)
    for _ in range(100):
        costs = np.array([[chance.random() for _ in range(5)] for _ in range(3)])
        in_memory = np.array([chance.random() < 0.5 for _ in range(5)])
        is_firsts = np.array([chance.random() < 0.5 for _ in range(5)])
        improve(is_firsts, costs, in_memory, 0.3)
        found = makespan(is_firsts, costs, in_memory, 0.3)
        splits = [np.array(split) for split in product((False, True), repeat=5)]
        near = [split for split in splits if (split != is_firsts).sum() == 1]
        near += [split for split in splits if (split != is_firsts).sum() == 2 and split.sum() == is_firsts.sum()]
        assert found <= min(makespan(split, costs, in_memory, 0.3) for split in near) + 1e-12


def test_no_items() -> None:
    empty = np.zeros(0, np.bool_)
    costs = np.zeros((3, 0))
    from_both_ends(empty, costs)
    improve(empty, costs, empty, 1.0)
    assert makespan(empty, costs, empty, 1.0) == pytest.approx(0.0)
