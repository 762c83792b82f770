"""Speed held against what was expected, window by window; trials of threads; both fed with made-up times."""

import pytest

from runtime.drift import ROUNDS, TURN_TOKENS, WINDOW_TOKENS, Drift, DriftWatch, ThreadTrial, other_threads


def fed(watch: DriftWatch, seconds: float, tokens: int = WINDOW_TOKENS) -> list[Drift]:
    return [drift for _ in range(tokens) if (drift := watch.add(seconds)) is not None]


@pytest.mark.parametrize(("rate", "drifts"), [(76, 0), (74, 1), (124, 0), (126, 1), (1, 1), (10_000, 1)])
def test_a_quarter_is_too_much(rate: float, drifts: int) -> None:
    found = fed(DriftWatch(100.0), 1 / rate)
    assert len(found) == drifts
    if found:
        assert found[0].measured_tokens_per_s == pytest.approx(rate)
        assert found[0].expected_tokens_per_s == 100.0
        assert found[0].is_slow == (rate < 100)


def test_the_verdict_falls_with_the_last_token_of_a_window() -> None:
    watch = DriftWatch(100.0)
    assert fed(watch, 1.0, WINDOW_TOKENS - 1) == []
    assert watch.add(1.0) == Drift(100.0, 1.0)


def test_a_lasting_difference_is_told_once_and_a_new_one_again() -> None:
    watch = DriftWatch(100.0)
    assert len(fed(watch, 1 / 50, 10 * WINDOW_TOKENS)) == 1
    again = fed(watch, 1 / 100, 10 * WINDOW_TOKENS)
    assert [(drift.is_slow, round(drift.expected_tokens_per_s)) for drift in again] == [(False, 50)]


def test_a_single_slow_token_is_no_drift() -> None:
    watch = DriftWatch(100.0)
    assert watch.add(0.1) is None
    assert fed(watch, 0.01, WINDOW_TOKENS - 1) == []


def test_without_an_expectation_the_first_window_makes_it() -> None:
    watch = DriftWatch()
    assert fed(watch, 1 / 10) == []
    assert fed(watch, 1 / 9) == []
    assert [drift.expected_tokens_per_s for drift in fed(watch, 1 / 5)] == [pytest.approx(10.0)]


def test_an_expectation_begins_a_window_anew() -> None:
    watch = DriftWatch(100.0)
    fed(watch, 1.0, WINDOW_TOKENS - 1)
    watch.expect(10.0)
    assert fed(watch, 0.1, WINDOW_TOKENS) == []


def test_a_drift_in_words() -> None:
    assert str(Drift(15.4, 9.1)) == "decoding at 9.10 tokens/s, 41% below the expected 15.4"
    assert str(Drift(100.0, 150.0)) == "decoding at 150 tokens/s, 50% above the expected 100"


def tried(seconds: dict[int, float], *, first: float = 0.0) -> tuple[ThreadTrial, list[int]]:
    """A trial in which a token takes `seconds` by the threads, the first of a turn `first` more; and who was asked."""
    trial, asked = ThreadTrial(tuple(seconds)), []
    while not trial.done:
        asked.append(trial.threads)
        is_first = len(asked) % TURN_TOKENS == 1
        trial.add(seconds[trial.threads] + (first if is_first else 0.0))
    return trial, asked


def test_the_faster_number_of_threads_wins() -> None:
    assert tried({2: 0.3, 1: 0.2})[0].fastest == 1
    assert tried({2: 0.2, 1: 0.3})[0].fastest == 2
    trial, _ = tried({8: 0.5, 7: 0.2, 4: 0.3, 1: 0.9})
    assert trial.fastest == trial.threads == 7
    assert trial.token_seconds(4) == 0.3


def test_candidates_take_turns() -> None:
    _, asked = tried({2: 0.3, 1: 0.2})
    assert asked == ([2] * TURN_TOKENS + [1] * TURN_TOKENS) * ROUNDS


def test_a_small_gain_is_no_reason_to_change() -> None:
    assert tried({2: 0.2, 1: 0.195})[0].fastest == 2


def test_the_first_token_of_a_turn_and_outliers_do_not_count() -> None:
    assert tried({2: 0.3, 1: 0.2}, first=5.0)[0].fastest == 1
    trial = ThreadTrial((2, 1))
    for index in range(ROUNDS * TURN_TOKENS * 2):
        trial.add(9.0 if index == TURN_TOKENS + 1 else {2: 0.3, 1: 0.2}[trial.threads])
    assert trial.fastest == 1


def test_a_restart_forgets() -> None:
    trial, _ = tried({2: 0.3, 1: 0.2})
    trial.restart()
    assert not trial.done
    assert (trial.threads, trial.present, trial.token_seconds(1)) == (2, 2, float("inf"))


def test_a_trial_needs_two_numbers_and_an_end() -> None:
    for candidates in ((2,), (2, 2), ()):
        with pytest.raises(ValueError, match="a trial of"):
            ThreadTrial(candidates)
    trial, _ = tried({2: 0.3, 1: 0.2})
    with pytest.raises(ValueError, match="done"):
        trial.add(1.0)


@pytest.mark.parametrize(
    ("present", "planned", "others"),
    [(1, 1, ()), (2, 2, (1,)), (1, 2, (2,)), (8, 8, (7, 4, 1)), (7, 8, (8, 6, 3, 1)), (3, 3, (2, 1))],
)
def test_threads_worth_a_trial(present: int, planned: int, others: tuple[int, ...]) -> None:
    assert other_threads(present, planned) == others
