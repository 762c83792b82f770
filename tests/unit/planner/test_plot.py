"""Pictures of machines, where matplotlib is installed, and what is said where it is not."""

import sys
from pathlib import Path

import pytest

from offload.errors import RequestError
from planner.machine_files import load_machine
from planner.plot import plot_machine


@pytest.mark.parametrize("name", ["laptop", "laptop-no-gpu"])
def test_a_picture_is_written(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_machine(load_machine(name), tmp_path / "machine.png")
    assert (tmp_path / "machine.png").read_bytes().startswith(b"\x89PNG")


def test_a_form_that_is_not_known(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RequestError, match="cannot write the picture"):
        plot_machine(load_machine("laptop"), tmp_path / "machine.nothing")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError) as error:
        plot_machine(load_machine("laptop"), tmp_path / "machine.png")
    assert error.value.hint == "pip install 'strata[plot]'"
