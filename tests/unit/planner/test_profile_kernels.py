"""Rates of kernels: measured here, undisturbed, and missing where measuring fails."""

import subprocess

import pytest

from planner import profile_kernels
from planner.machine import KernelPoint
from planner.profile_kernels import COLUMNS, _undisturbed, measure, measure_apart


def test_every_type_has_points() -> None:
    points = measure(["Q8_0", "I64"], 2).types
    assert set(points) == {"Q8_0"}
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

    monkeypatch.setattr(profile_kernels.subprocess, "run", fail)
    assert measure_apart(["Q8_0"], 1) == {}
    assert "Q8_0 could not be measured" in caplog.text
