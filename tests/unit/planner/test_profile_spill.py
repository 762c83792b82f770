"""What reading chunks of keys and values back takes is measured once and kept."""

from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import FlashError
from planner import profile_spill
from planner.profile import stored
from planner.profile_spill import measure, spill_rates, with_spill_rates
from tests.support.planning import profile_here

measure_apart = profile_spill.measure_apart  # which other tests do without


def test_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_spill, "SLOTS", 20)
    monkeypatch.setattr(profile_spill, "_LEAST_S", 0.01)
    rates = measure(tmp_path, 1)
    assert min(rates.bytes_per_s, rates.beside_bytes_per_s, rates.parts_bytes_per_s) > 0
    assert 0 < rates.computed_share <= 1
    assert not list(tmp_path.iterdir())


def test_kept(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile = with_spill_rates(profile_here(), tmp_path, path)
    assert stored(path) == profile
    known = replace(profile, spills={key: replace(rates, computed_share=0.5) for key, rates in profile.spills.items()})
    assert with_spill_rates(known, tmp_path, path) is known
    assert spill_rates(known, tmp_path).computed_share == 0.5


def test_a_drive_that_cannot_be_measured_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FlashError, match="cannot be measured"):
        measure_apart(tmp_path / "file", 1)
