"""The gate in front of reads on a guess: a trial's order, noise, and that it stays open only where that is faster."""

import logging
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.prefetch_gate import (
    KEPT_TOKENS,
    SETTLING_TOKENS,
    WINDOW_TOKENS,
    WINDOWS,
    PrefetchGate,
    PrefetchMode,
    Trial,
)

TRIAL_TOKENS = len(WINDOWS) * WINDOW_TOKENS


def run(gate: PrefetchGate, tokens: int, *, opened_s: float, closed_s: float, noise: float = 0.0) -> list[bool]:
    """Decodes tokens; whether the gate was open for each."""
    chance, states = random.Random(1), []
    for _ in range(tokens):
        states.append(gate.is_open)
        gate.token_took((opened_s if gate.is_open else closed_s) * (1 + noise * (2 * chance.random() - 1)))
    return states


def test_a_trial_has_windows_in_an_order_that_a_drift_does_not_favor() -> None:
    states = run(PrefetchGate(), TRIAL_TOKENS, opened_s=1.0, closed_s=1.0)
    assert states == [is_open for is_open in WINDOWS for _ in range(WINDOW_TOKENS)]
    places = [number for number, is_open in enumerate(WINDOWS) if is_open]
    others = [number for number, is_open in enumerate(WINDOWS) if not is_open]
    assert sum(places) / len(places) == sum(others) / len(others)


@pytest.mark.parametrize(("opened_s", "wins"), [(0.09, True), (0.11, False)])
def test_the_winner_is_kept_until_the_next_trial(opened_s: float, wins: bool) -> None:
    gate = PrefetchGate()
    states = run(gate, TRIAL_TOKENS + KEPT_TOKENS, opened_s=opened_s, closed_s=0.1, noise=0.02)
    assert states[TRIAL_TOKENS:] == [wins] * KEPT_TOKENS
    assert gate.newest is not None
    assert gate.newest.is_won is wins
    assert gate.newest.open_s == pytest.approx(opened_s, rel=0.02)
    assert gate.newest.closed_s == pytest.approx(0.1, rel=0.02)
    again = run(gate, TRIAL_TOKENS, opened_s=0.2 - opened_s, closed_s=0.1, noise=0.02)
    assert again == states[:TRIAL_TOKENS]
    assert gate.is_open is not wins, "the next trial says otherwise"


def test_a_gain_within_the_noise_is_none() -> None:
    gate = PrefetchGate()
    run(gate, TRIAL_TOKENS, opened_s=0.0995, closed_s=0.1, noise=0.3)
    assert not gate.is_open


def test_tokens_while_a_window_settles_do_not_count() -> None:
    gate = PrefetchGate()
    for number in range(TRIAL_TOKENS):
        settles = number % WINDOW_TOKENS < SETTLING_TOKENS
        gate.token_took(100.0 if settles else 0.1 - 0.02 * gate.is_open)
    assert gate.newest == Trial(pytest.approx(0.08), pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))


def test_single_hiccups_do_not_decide() -> None:
    gate, chance = PrefetchGate(), random.Random(2)
    for number in range(TRIAL_TOKENS):
        hiccup = 5.0 if number % 13 == 7 else 0.0
        gate.token_took((0.09 if gate.is_open else 0.1) * (0.99 + 0.02 * chance.random()) + hiccup)
    assert gate.is_open


@pytest.mark.parametrize(("mode", "is_open"), [(PrefetchMode.OFF, False), (PrefetchMode.ON, True)])
def test_without_trials_it_stays_as_it_is(mode: PrefetchMode, is_open: bool) -> None:
    gate = PrefetchGate(mode)
    assert run(gate, 500, opened_s=1.0 + is_open, closed_s=1.0) == [is_open] * 500
    assert gate.newest is None


def test_a_change_is_told(caplog: pytest.LogCaptureFixture) -> None:
    gate = PrefetchGate()
    with caplog.at_level(logging.INFO, "strata.experts"):
        run(gate, TRIAL_TOKENS + KEPT_TOKENS, opened_s=0.08, closed_s=0.1)
        run(gate, TRIAL_TOKENS + KEPT_TOKENS, opened_s=0.08, closed_s=0.1)
        run(gate, TRIAL_TOKENS, opened_s=0.1, closed_s=0.08)
    assert [record.message[:29] for record in caplog.records] == [
        "reading experts ahead is on: ",
        "reading experts ahead is off:",
    ]
    assert "80.00 ms a token with it, 100.00 without" in caplog.records[0].message


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=3 * (TRIAL_TOKENS + KEPT_TOKENS)))
def test_whatever_tokens_take_it_is_only_open_in_trials_or_after_one_was_won(seconds: list[float]) -> None:
    gate = PrefetchGate()
    for number, taken in enumerate(seconds):
        place = number % (TRIAL_TOKENS + KEPT_TOKENS)
        if place < TRIAL_TOKENS:
            assert gate.is_open is WINDOWS[place // WINDOW_TOKENS]
        else:
            assert gate.newest is not None
            assert gate.is_open is gate.newest.is_won
        gate.token_took(taken)
