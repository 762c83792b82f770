"""Row 15: whenever power is lost or the process is killed, a session opens as it was before or after the turn."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offload.kv_session_document import SessionDocument, read_document, write_document
from offload.store_files import FILES
from runtime.engine import Engine
from runtime.session_saved import SavedSession
from tests.support.kv_blocks import DIGESTS, KEY, filled, read
from tests.support.models import FAMILIES, write_model
from tests.support.sessions import NAME, answer, first_turn
from tests.support.stores import LosingFiles, PowerLost

MOST_CALLS = 60
OLD, NEW = (SessionDocument(KEY, ({"role": "user", "content": text},), (1, 2)) for text in ("old", "new"))
KILLED = """
import sys
from pathlib import Path
from offload.kv_session_document import write_document
from tests.faults.test_row_15_sessions import NEW
from tests.support.kv_blocks import filled
from tests.support.stores import KillingFiles

files = KillingFiles(int(sys.argv[2]))
filled(Path(sys.argv[1]), files)
write_document(Path(sys.argv[1]), NEW, files)
"""
KILLED_TURN = """
import sys
from pathlib import Path
from runtime.engine import Engine
from runtime.session_saved import SavedSession
from tests.support.sessions import NAME, answer
from tests.support.stores import KillingFiles

ids = [int(token) for token in sys.argv[4].split()]
with Engine(Path(sys.argv[1]), threads=1, context_tokens=256, gpu="off") as engine:
    with SavedSession(NAME, Path(sys.argv[2]), files=KillingFiles(int(sys.argv[3]))) as saved:
        answer(engine, ids, saved)
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


def test_row_15_after_a_kill_in_the_middle_of_a_turn_the_conversation_goes_on(tmp_path: Path) -> None:
    path = write_model(tmp_path / "llama.gguf", FAMILIES["llama"], "Q8_0")
    with Engine(path, threads=1, context_tokens=256, gpu="off") as engine:
        turn = first_turn(engine, tmp_path / "before")
        expected, _ = answer(engine, turn)
        killed: dict[Path, subprocess.Popen[bytes]] = {}
        for calls in (0, 2, 4, 6, 1000):
            root = tmp_path / str(calls)
            shutil.copytree(tmp_path / "before", root)
            words = [str(path), str(root), str(calls), " ".join(map(str, turn))]
            killed[root] = subprocess.Popen([sys.executable, "-c", KILLED_TURN, *words])
        codes = [process.wait(120) for process in killed.values()]
        assert codes == [-9, -9, -9, -9, 0]
        for root in killed:
            with SavedSession(NAME, root) as saved:
                assert saved.document is not None
                pieces, computed = answer(engine, turn, saved)
            assert [piece.token_id for piece in pieces] == [piece.token_id for piece in expected]
            assert computed <= len(turn) - 128, "what was written before is read"
