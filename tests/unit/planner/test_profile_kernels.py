"""Rates of kernels: measured here, undisturbed, and missing where measuring fails."""

import subprocess

import pytest

from cpu_kernels.isa import current
from cpu_kernels.tuning import Choice, Family, Tuning
from planner import apart
from planner.machine import KernelPoint
from planner.profile_kernels import COLUMNS, KernelPoints, _undisturbed, measure, measure_apart


def test_every_type_has_points() -> None:
    found = measure(["Q8_0", "I64"], 2)
    points = found.types
    assert set(points) == {"Q8_0"}
    assert found.tuning is not None
    assert set(found.tuning.choices) == {"Q8_0"}
    assert [(point.threads, point.columns) for point in points["Q8_0"]] == [(t, c) for t in (1, 2) for c in COLUMNS]
    for threads in (1, 2):
        rates = [point.bytes_per_s for point in points["Q8_0"] if point.threads == threads]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] > 0


def test_more_columns_never_take_less_time() -> None:
    points = [KernelPoint(1, 1, 10.0, 10.0), KernelPoint(1, 4, 30.0, 120.0), KernelPoint(1, 16, 20.0, 320.0)]
    kept = _undisturbed(points)
    assert [point.bytes_per_s for point in kept] == [30.0, 30.0, 20.0]
    assert kept[0].macs_per_s == pytest.approx(30.0)


def test_a_failure_leaves_types_unmeasured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("measuring", 1)

    monkeypatch.setattr(apart.subprocess, "run", fail)
    assert measure_apart(["Q8_0"], 1) == KernelPoints()
    assert "Q8_0 could not be measured" in caplog.text


def test_where_a_rung_is_forced_the_usual_kernels_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATA_ISA", current().name)
    found = measure(["Q8_0"], 1)
    assert found.tuning is None
    assert not found.missing(["Q8_0"])
    monkeypatch.delenv("STRATA_ISA")
    assert found.missing(["Q8_0"]) == ["Q8_0"]


def test_types_lack_points_or_a_choice_for_these_kernels() -> None:
    points = (KernelPoint(1, 1, 1.0, 1.0),)
    chosen = Tuning(current().name, {"Q8_0": Choice(Family.DOT, 8)})
    known = KernelPoints({"Q8_0": points, "Q4_0": points}, chosen)
    assert known.missing(["Q8_0", "Q4_0", "F16"]) == ["F16", "Q4_0"]
    other = KernelPoints({"Q8_0": points}, Tuning("other", chosen.choices))
    assert other.missing(["Q8_0"]) == ["Q8_0"]
    assert other.updated(known) == known
