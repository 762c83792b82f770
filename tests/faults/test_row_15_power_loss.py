"""Row 15: whenever power is lost or the process is killed, what is left is a whole store or one to go on with."""

import subprocess
import sys
from pathlib import Path

import pytest

from offload import store_writer
from offload.store_writer import StoreWriter
from tests.support.stores import BUNDLES, KEY, LosingFiles, PowerLost, build, is_whole

MOST_CALLS = 80
KILLED = """
import os, signal
from pathlib import Path
from offload import store_writer
from tests.support.stores import BUNDLES, KEY, contents

store_writer.BATCH_BYTES = 6000
writer = store_writer.StoreWriter(Path({folder!r}), KEY, BUNDLES)
for index in range(4):
    writer.write(index, contents()[index])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "BATCH_BYTES", 6000)
    monkeypatch.setattr(store_writer, "WRITE_BYTES", 4096)


@pytest.mark.parametrize("seed", range(4))
def test_row_15_power_is_lost_at_any_call(tmp_path: Path, seed: int) -> None:
    for last in range(1, MOST_CALLS):
        folder = tmp_path / str(last) / "store"
        files = LosingFiles(last, seed)
        try:
            build(folder, files)
            is_over = True
        except PowerLost:
            is_over = False
        files.lose_power()
        if is_over:
            assert last > 20
            assert is_whole(folder)
            return
        if folder.exists():
            (folder / "journal").unlink(missing_ok=True)
            assert is_whole(folder)
        build(folder)
        assert is_whole(folder)
    pytest.fail(f"no clean run within {MOST_CALLS} calls")


def test_row_15_a_killed_build_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    done = subprocess.run([sys.executable, "-c", KILLED.format(folder=str(folder))], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert not folder.exists()
    with StoreWriter(folder, KEY, BUNDLES) as writer:
        assert writer.done == {0, 1, 2, 3}
    build(folder)
    assert is_whole(folder)
