"""Counts of guesses: which came true, what was read in vain, how many are worth a try."""

import numpy as np
import pytest

from offload.expert_load import Load, Piece
from offload.flash import Extent, Priority
from offload.foresight import MOST_GUESSES, Foresight


def load(expert: int, num_bytes: int = 100) -> Load:
    piece = Piece(0, Extent(0, 0, num_bytes), lambda data, slot: None)
    return Load(0, expert, 0, [piece], 1, Priority.PREFETCH)


def used(*experts: int) -> np.ndarray:
    flags = np.zeros(8, bool)
    flags[list(experts)] = True
    return flags


def test_guesses_are_settled_once_by_their_own_layer() -> None:
    foresight = Foresight()
    foresight.begun(1, [load(2), load(3)])
    foresight.begun(2, [load(2)])
    foresight.settle(0, used(2, 3))
    assert (foresight.settled, foresight.used) == (0, 0)
    foresight.settle(1, used(3, 5))
    foresight.settle(1, used(2))
    assert (foresight.foreseen, foresight.settled, foresight.used, foresight.wasted_bytes) == (3, 2, 1, 100)
    foresight.forget()
    foresight.settle(2, used())
    assert foresight.settled == 2, "what was forgotten is nobody's fault"


def test_what_was_cancelled_is_not_wasted() -> None:
    foresight, guess = Foresight(), load(4, 1000)
    foresight.begun(0, [guess])
    guess.num_bytes -= 700  # as a drop does
    foresight.settle(0, used())
    assert foresight.wasted_bytes == 300


def test_the_better_the_guesses_the_more_are_made() -> None:
    good, bad = Foresight(), Foresight()
    for _ in range(50):
        for foresight, expert in ((good, 1), (bad, 2)):
            foresight.begun(0, [load(1)])
            foresight.settle(0, used(expert))
    assert (good.most, bad.most) == (MOST_GUESSES, 1)
    assert 1 <= Foresight().most < MOST_GUESSES


def test_a_guess_is_worth_what_is_needed_as_often_as_it_comes_true() -> None:
    foresight = Foresight()
    assert foresight.worth(0.0, 10.0) == pytest.approx(5.0), "nothing is known yet"
    for _ in range(98):
        foresight.begun(0, [load(1)])
        foresight.settle(0, used())
    assert foresight.worth(-3.0, 10.0) == pytest.approx(-3.0 * 0.99 + 10.0 * 0.01)
