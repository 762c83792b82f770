"""Fixtures every test may use."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload import gguf_source
from offload.flash_probe import DriveFigures, ReadFigure
from planner.machine import SpillRates
from planner.profile import save
from planner.profile_attention import AttentionRates
from tests.support.planning import profile_here

if TYPE_CHECKING:
    from runtime.engine import Engine

REPOSITORY = Path(__file__).resolve().parents[1]
KEPT_S = 7 * 24 * 3600


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of trained models, texts and tokenizer cases beside the repository, where there is one."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles and caches of the tests live in a folder of their own, not in the user's.

    The profile there has round figures: nobody waits for measurements, which other tests would disturb. Compiled
    kernels, whose names tell what they are made of, lie in pytest's cache, for all workers and later runs.
    """
    folder = tmp_path_factory.mktemp("cache")
    save(profile_here(), folder / "strata" / "profile.json")
    if request.config.pluginmanager.has_plugin("cacheprovider"):
        kernels = request.config.cache.mkdir("kernels")
        _remove_old(kernels)
        (folder / "strata" / "kernels").symlink_to(kernels, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


def _remove_old(folder: Path) -> None:
    """Files of `folder` that no run of the last week has made."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another worker's removal
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()


@pytest.fixture(scope="session", autouse=True)
def _known_drive() -> Iterator[None]:
    """Plans of models that do not fit in RAM ask how fast the drive is: nobody waits 8 s for a measurement here."""
    figures = DriveFigures((ReadFigure(1 << 20, 4, True, 2e9),), 1e9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.profile.probe", lambda _, **_options: figures)
        patch.setattr("planner.profile_attention.measure_apart", lambda *_: AttentionRates())
        patch.setattr("planner.profile_spill.measure_apart", lambda *_: SpillRates(2e9, 1.5e9, 0.9, 5e8))
        yield


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
