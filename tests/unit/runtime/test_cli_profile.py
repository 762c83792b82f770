"""`strata profile`: measured once, shown, written as JSON, drawn."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cpu_kernels.isa import current
from cpu_kernels.tuning import Choice, Family, Tuning
from offload import flash_probe
from offload.errors import FlashError
from planner import profile as profiles
from planner.machine import KernelPoint
from planner.planned_draft import LearnedAcceptance
from planner.profile_kernels import KernelPoints
from planner.profile_learned import record_observation
from runtime.cli import profile as command
from runtime.cli.main import State, app

RATES = tuple(KernelPoint(threads, columns, 1e9, 2e9) for threads in (1, 2) for columns in (1, 128))


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and a machine that is measured in no time."""
    measured = replace(profiles.load_or_measure(), drives={}, kernels={}, tuning=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profiles, "measure_apart", lambda: measured)
    monkeypatch.setattr(command, "measure_apart", lambda: measured)
    rates = tuple(point for point in RATES if point.threads in (1, measured.threads))
    usual = Choice(Family.DOT, current().tile_columns)

    def _measured_points(names: Iterable[str], _: int) -> KernelPoints:
        return KernelPoints(dict.fromkeys(names, rates), Tuning(current().name, dict.fromkeys(names, usual)))

    monkeypatch.setattr(profiles.profile_kernels, "measure_apart", _measured_points)
    monkeypatch.setattr(flash_probe, "SECONDS_A_POINT", 0.001)
    figures = flash_probe.DriveFigures((flash_probe.ReadFigure(1 << 20, 4, True, 2e9),), 1e9)
    monkeypatch.setattr(profiles, "probe", lambda _, **_options: figures)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", *arguments], obj=State(), catch_exceptions=False)


def test_the_machine_is_shown() -> None:
    shown = invoke()
    assert shown.exit_code == 0
    for word in ("CPU", "RAM", "GPU", "Q4_0", "1.0 GB/s", "direct x4", "2.00"):
        assert word in shown.output, word


def test_json_is_the_stored_profile(tmp_path: Path) -> None:
    written = json.loads(invoke("--json").stdout)
    assert written == json.loads((tmp_path / "cache/strata/profile.json").read_text(encoding="utf-8"))
    assert written["kernels"]["Q4_0"][0]["bytes_per_s"] == 1e9


def test_a_model_names_drive_and_types(tmp_path: Path) -> None:
    written = json.loads(invoke("-m", "demo", "--json").stdout)
    assert "Q8_0" in written["kernels"]
    assert "Q2_K" not in written["kernels"]


def test_again_keeps_what_runs_taught(tmp_path: Path) -> None:
    invoke()
    profile = record_observation(profiles.load_or_measure(), ["decode/test"], predicted_s=1.0, measured_s=2.0)
    profile = replace(profile, acceptances={"demo with a draft": LearnedAcceptance(0.7, 3)})
    profiles.save(profile)
    assert profile.residuals
    invoke("--again")
    again = profiles.load_or_measure()
    assert again.residuals == profile.residuals
    assert again.acceptances == profile.acceptances


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert invoke("--plot", str(tmp_path / "machine.png")).exit_code == 0
    assert (tmp_path / "machine.png").stat().st_size > 1000


def test_a_drive_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, **_options: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(profiles, "probe", fail)
    with pytest.raises(FlashError, match="no space"):
        invoke()
