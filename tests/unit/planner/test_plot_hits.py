"""Pictures of hit rates, where matplotlib is installed, and what is said where it is not."""

import sys
from pathlib import Path

import pytest

from offload.errors import RequestError
from planner.plot_hits import plot_hits

CURVES = {"lru": [(1, 0.1), (2, 0.3)], "belady": [(1, 0.2), (2, 0.5)]}


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_hits(CURVES, "belady", "a model", tmp_path / "hits.png")
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")


def test_a_form_that_is_not_known(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RequestError, match="cannot write the picture"):
        plot_hits(CURVES, "belady", "a model", tmp_path / "hits.nothing")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError) as error:
        plot_hits(CURVES, "belady", "a model", tmp_path / "hits.png")
    assert error.value.hint == "pip install 'strata[plot]'"
