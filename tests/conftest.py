"""Fixtures every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload import gguf_source
from offload.flash_probe import DriveFigures, ReadFigure

if TYPE_CHECKING:
    from runtime.engine import Engine

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of trained models, texts and tokenizer cases beside the repository, where there is one."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles and caches of the tests live in a folder of their own, not in the user's."""
    previous = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if previous is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = previous


@pytest.fixture(autouse=True)
def _known_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of models that do not fit in RAM ask how fast the drive is: nobody waits 8 s for a measurement here."""
    figures = DriveFigures((ReadFigure(1 << 20, 4, True, 2e9),), 1e9)
    monkeypatch.setattr("planner.profile.probe", lambda _, **_options: figures)


@pytest.fixture(scope="session")
def demo_engine() -> Iterator["Engine"]:
    """The built-in model, loaded once."""
    from runtime.engine import Engine
    from runtime.models import DEMO_MODEL

    with Engine(DEMO_MODEL, threads=1) as engine:
        yield engine


@pytest.fixture
def no_read_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that failed are tried again at once."""
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)
