import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload.errors import FlashError, RequestError
from offload.kv_session_lock import NamedLock, holder

HOLDS = """
import sys
from pathlib import Path
from offload.kv_session_lock import NamedLock
with NamedLock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_holder_is_named_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert holder(path) is None
    lock = NamedLock(path, "session a")
    assert holder(path) == f"process {os.getpid()}"
    with pytest.raises(RequestError, match=f"session a is in use by process {os.getpid()}"):
        NamedLock(path, "session a")
    lock.close()
    lock.close()
    assert holder(path) is None
    NamedLock(path, "session a").close()


def test_another_process_is_named_and_its_kill_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RequestError, match=f"in use by process {process.pid}") as caught:
            NamedLock(path, "session a")
        assert caught.value.hint
        process.kill()
    NamedLock(path, "session a").close()


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with NamedLock(path, "session a"):
        path.unlink()
        with NamedLock(path, "session a"):
            assert holder(path) == f"process {os.getpid()}"


def test_a_folder_that_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(FlashError, match="cannot be locked"):
        NamedLock(tmp_path / "none" / "lock", "session a")
