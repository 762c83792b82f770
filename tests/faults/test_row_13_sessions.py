"""Row 13: a drive that is full, or fails, while a session or its KV is written leaves the session as it was."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.errors import FlashError
from offload.kv_session_document import SessionDocument, read_document, write_document
from offload.store_files import FILES
from runtime.engine import Engine
from runtime.session_saved import SavedSession
from tests.support.kv_blocks import DIGESTS, KEY, filled, read
from tests.support.models import FAMILIES, write_model
from tests.support.sessions import NAME, answer, first_turn, tokens
from tests.support.stores import FailingFiles

MOST_CALLS = 60
CODES = [errno.ENOSPC, errno.EIO, errno.EROFS]
OLD, NEW = (SessionDocument(KEY, ({"role": "user", "content": text},), (1, 2)) for text in ("old", "new"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write_model(tmp_path_factory.mktemp("models") / "llama.gguf", FAMILIES["llama"], "Q8_0")
    with Engine(path, threads=1, context_tokens=256, gpu="off") as made:
        yield made


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("lasting", [False, True])
def test_row_13_a_failure_at_any_call_leaves_whole_blocks_or_none(tmp_path: Path, code: int, lasting: bool) -> None:
    for first in range(1, MOST_CALLS):
        folder = tmp_path / str(first)
        files = FailingFiles(first, MOST_CALLS * 2 if lasting else first, code)
        try:
            filled(folder, files)
        except FlashError as error:
            assert str(folder) in str(error)
            assert error.hint
        else:
            assert files.calls < first
            assert first > 10
            return
        assert list(folder.glob("*.partial")) == []
        blocks = filled(folder)
        assert read(blocks) == (list(range(len(DIGESTS))), None)
    pytest.fail(f"no clean run within {MOST_CALLS} calls")


@pytest.mark.parametrize("code", CODES)
def test_row_13_a_failure_at_any_call_leaves_the_old_document_or_the_new_one(tmp_path: Path, code: int) -> None:
    write_document(tmp_path, OLD, FILES)
    for first in range(1, MOST_CALLS):
        files = FailingFiles(first, first, code)
        try:
            write_document(tmp_path, NEW, files)
        except OSError as error:
            assert error.errno == code
            assert read_document(tmp_path) == (NEW if files.calls > 5 else OLD)
            assert list(tmp_path.glob("*.partial")) == []
            write_document(tmp_path, OLD, FILES)
        else:
            assert files.calls < first
            assert first > 5
            return
    pytest.fail(f"no clean run within {MOST_CALLS} calls")


@pytest.mark.parametrize("lasting", [False, True])
def test_row_13_the_answer_is_given_and_the_old_session_opens(
    engine: Engine, tmp_path: Path, lasting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    turn = first_turn(engine, tmp_path / "before")
    expected, _ = answer(engine, turn)
    refused = 0
    for first in range(1, MOST_CALLS):
        root = tmp_path / str(first)
        shutil.copytree(tmp_path / "before", root)
        files = FailingFiles(first, MOST_CALLS * 2 if lasting else first, errno.ENOSPC)
        try:
            with SavedSession(NAME, root, files=files) as saved:
                assert tokens(answer(engine, turn, saved)[0]) == tokens(expected)
        except FlashError as error:
            refused += 1
            assert error.hint
        else:
            if files.calls < first:
                assert first > 8
                assert refused
                assert "KV is not kept" in caplog.text
                return
        with SavedSession(NAME, root) as saved:
            assert saved.document is not None
            pieces, computed = answer(engine, turn, saved)
            assert tokens(pieces) == tokens(expected)
            assert computed <= len(turn) - 128
    pytest.fail(f"no clean run within {MOST_CALLS} calls")
