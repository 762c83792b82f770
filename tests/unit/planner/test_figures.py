"""Numbers as people read them."""

import pytest

from planner.figures import count, duration, figures, plural


@pytest.mark.parametrize(
    ("number", "text"), [(2785.4, "2785"), (33.33, "33.3"), (2.484, "2.48"), (0.5, "0.50"), (0.0661, "0.066")]
)
def test_figures(number: float, text: str) -> None:
    assert figures(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(300, "5.0 min"), (1.5, "1.50 s"), (0.0125, "12.5 ms"), (3.2e-5, "32.0 us")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts() -> None:
    assert [count(number) for number in (999, 14_400_000, 7_200_000_000)] == ["999", "14.4M", "7.2B"]
    assert plural(1, "thread") == "thread"
    assert plural(2, "thread") == "threads"
