"""Row 15: whenever power is lost or the process is killed, a session opens as it was before or after the turn."""

import subprocess
import sys
from pathlib import Path

import pytest

from offload.kv_session_document import SessionDocument, read_document, write_document
from offload.store_files import FILES
from tests.support.kv_blocks import DIGESTS, KEY, filled, read
from tests.support.stores import LosingFiles, PowerLost

MOST_CALLS = 60
OLD, NEW = (SessionDocument(KEY, ({"role": "user", "content": text},), (1, 2)) for text in ("old", "new"))
KILLED = """
import os, signal, sys
from pathlib import Path
from offload.kv_session_document import write_document
from offload.store_files import Files
from tests.faults.test_row_15_sessions import NEW
from tests.support.kv_blocks import filled

class KillingFiles(Files):
    left = int(sys.argv[2])

    def __getattribute__(self, name):
        if not name.startswith("_") and name != "left":
            KillingFiles.left -= 1
            if KillingFiles.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)

filled(Path(sys.argv[1]), KillingFiles())
write_document(Path(sys.argv[1]), NEW, KillingFiles())
"""


@pytest.mark.parametrize("seed", range(4))
def test_row_15_power_is_lost_at_any_call(tmp_path: Path, seed: int) -> None:
    for last in range(1, MOST_CALLS):
        folder = tmp_path / str(last)
        folder.mkdir()
        write_document(folder, OLD, FILES)
        files = LosingFiles(last, seed)
        try:
            filled(folder, files)
            write_document(folder, NEW, files)
            is_over = True
        except PowerLost:
            is_over = False
        files.lose_power()
        assert read_document(folder) == (NEW if is_over else OLD)
        assert read(filled(folder)) == (list(range(len(DIGESTS))), None)
        if is_over:
            assert last > 20
            return
    pytest.fail(f"no clean run within {MOST_CALLS} calls")


def test_row_15_after_a_kill_the_old_session_opens(tmp_path: Path) -> None:
    for calls in (2, 4, 9, 17, 25, 29, 31):
        folder = tmp_path / str(calls)
        folder.mkdir()
        write_document(folder, OLD, FILES)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), str(calls)], check=False, capture_output=True, text=True
        )
        assert done.returncode in (-9, 0), done.stderr
        assert read_document(folder) == (OLD if done.returncode else NEW)
        blocks = filled(folder)
        assert read(blocks) == (list(range(len(DIGESTS))), None)
        blocks.keep_only(DIGESTS)
        assert len(list(folder.iterdir())) == len(DIGESTS) + 1 + len(list(folder.glob("session.json.partial")))
    assert done.returncode == 0
