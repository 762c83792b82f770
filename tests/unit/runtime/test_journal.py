"""The journal: durable appends, torn tails, foreign files, locks, failing disks."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import FlashError, RequestError
from runtime import journal as journal_module
from runtime.journal import Journal

RECORDS = [{"id": f"r{i}", "text": "ä\n\u2028" * i, "request_sha256": f"s{i}"} for i in range(5)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_what_is_appended_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path) as journal:
        assert journal.done == {}
        journal.append(RECORDS[0])
        journal.append(*RECORDS[1:3])
        assert lines(path) == RECORDS[:3]
    with Journal(path) as journal:
        assert journal.done == {"r0": "s0", "r1": "s1", "r2": "s2"}
        journal.append(*RECORDS[3:])
        journal.close()
    assert lines(path) == RECORDS
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


def test_custom_id_comes_before_id(tmp_path: Path) -> None:
    with Journal(tmp_path / "out") as journal:
        journal.append({"id": "batch_req_1", "custom_id": "mine", "request_sha256": "s"})
        assert journal.done == {"mine": "s"}


def test_the_same_id_twice_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with Journal(tmp_path / "out") as journal:
        journal.append(RECORDS[0])
        with pytest.raises(ValueError, match="r0 is in the journal already"):
            journal.append(RECORDS[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_keeps_its_whole_records(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out"
    with Journal(path) as journal:
        journal.append(*RECORDS[:4])
    whole = path.read_bytes()
    length = data.draw(st.integers(0, len(whole)))
    zeros = data.draw(st.sampled_from([b"", b"\0" * 7, b"\0" * 4096]))
    path.write_bytes(whole[:length] + zeros)
    kept = whole[:length].count(b"\n")
    with Journal(path) as journal:
        assert journal.done == {f"r{i}": f"s{i}" for i in range(kept)}
        journal.append(*RECORDS[kept:])
    assert lines(path) == RECORDS


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"hello\n",
        b'{"id": 1, "prompt": "a file of prompts without a last newline"}',
        b'{"id": "a", "prompt": "x"}\n',
        b'{"id": 1, "request_sha256": "s"}\n',
        b'["id"]\n',
        b'{"id": "a", "request_sha256": "s"}\nnot json\n{"id": "b", "request_sha256": "s"}\n',
        b'{"id": "a", "requ\0\0\0\n{"id": "b", "request_sha256": "s"}\n',
        b"GGUF\3\0\0\0\0\0\0\0",
        b"[" * 100_000 + b"\n",
        b'{"id": "\xff", "request_sha256": "s"}\n',
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_file_no_batch_wrote_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"line [12] of .*out is not a record of a batch") as caught:
        Journal(path)
    assert "--overwrite" in str(caught.value.hint)
    assert path.read_bytes() == content
    with Journal(path, overwrite=True) as journal:
        assert journal.done == {}
    assert path.read_bytes() == b""


def test_two_records_of_one_id_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b'{"id": "a", "request_sha256": "s"}\n' * 2)
    with pytest.raises(RequestError, match="two records of 'a', the second on line 2"):
        Journal(path)


def test_an_endless_line_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "out"
    path.write_bytes(b'{"id": "' + b"x" * 200)
    with pytest.raises(RequestError, match="not a record"):
        Journal(path)


def test_only_one_process_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with Journal(path), pytest.raises(RequestError, match="written by another process"):
        Journal(path, overwrite=True)
    with Journal(path):
        pass


@pytest.mark.parametrize("name", ["/dev/full", "/dev/null", "."])
def test_what_cannot_be_read_again_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=r"not a regular file|cannot write to"):
        Journal(name)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        Journal(tmp_path / "no" / "out")


def _failing(
    call: Callable[..., Any], at: int, *, partial: bool = False, persistent: bool = False
) -> Callable[..., Any]:
    """`call`, failing with ENOSPC at its `at`-th use (and after it, where persistent), perhaps half done."""
    uses = 0

    def wrapped(descriptor: int, *arguments: Any) -> Any:
        nonlocal uses
        uses += 1
        if uses == at or (persistent and uses > at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if partial and uses == at - 1:
            return call(descriptor, arguments[0][: len(arguments[0]) // 2])
        return call(descriptor, *arguments)

    return wrapped


@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize("partial", [False, True])
def test_a_full_disk_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, partial: bool) -> None:
    path = tmp_path / "out"
    with Journal(path) as journal:
        journal.append(RECORDS[0])
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            fault = _failing(getattr(os, name), 2 if partial and name == "write" else 1, partial=partial)
            patch.setattr(journal_module.os, name, fault)
            with pytest.raises(FlashError, match="No space left on device") as caught:
                journal.append(RECORDS[1])
        assert "resumes" in str(caught.value.hint)
        assert path.read_bytes() == before
        assert journal.done == {"r0": "s0"}
        journal.append(RECORDS[1])
    assert lines(path) == RECORDS[:2]


def test_a_disk_that_cannot_even_cut_is_told_and_mended_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    with Journal(path) as journal:
        journal.append(RECORDS[0])
        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "write", _failing(os.write, 2, partial=True))
            patch.setattr(journal_module.os, "ftruncate", _failing(os.ftruncate, 1))
            with pytest.raises(FlashError, match="nor cut the half-written record off"):
                journal.append(RECORDS[1])
    assert len(path.read_bytes().split(b"\n")[1]) > 0
    with Journal(path) as journal:
        assert journal.done == {"r0": "s0"}


def test_a_disk_that_cannot_be_synced_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module.os, "fsync", _failing(os.fsync, 1))
    with pytest.raises(FlashError, match="cannot open the journal"):
        Journal(tmp_path / "out")
