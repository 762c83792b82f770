import json
import os
from pathlib import Path

import pytest

from offload.kv_session_lock import NamedLock
from runtime.session_saved import sessions_folder
from tests.support.command import Outcome, strata

MODEL = ("-m", "demo", "-t", "1", "-c", "512", "--gpu", "off", "--temp", "0", "-q")
FIRST, SECOND = "The sun rose over the hills and the man began to walk.", "And what did he see there?"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return sessions_folder()


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "Chat":
    return Chat(capsys, monkeypatch)


class Chat:
    """Commands of one test, each as a process of its own would run it."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._fixtures = capsys, monkeypatch

    def says(self, *messages: str, session: str | None = "tale", options: tuple[str, ...] = ()) -> Outcome:
        """`strata chat` with these messages."""
        named = () if session is None else ("--session", session)
        text = "".join(f"{message}\n" for message in messages)
        return strata(*self._fixtures, "chat", *MODEL, "-n", "40", *named, *options, stdin=text)

    def strata(self, *arguments: str) -> Outcome:
        """Any command."""
        return strata(*self._fixtures, *arguments)


def test_a_chat_of_two_processes_says_the_same_as_one_of_one(chat: Chat) -> None:
    whole = chat.says(FIRST, SECOND, session=None)
    first, second = chat.says(FIRST), chat.says(SECOND)
    assert whole.code == first.code == second.code == 0
    assert first.stdout + second.stdout == whole.stdout
    assert json.loads(chat.strata("session", "ls", "--json").stdout)[0]["messages"] == 4


def test_run_goes_on_with_a_chat(chat: Chat) -> None:
    whole = chat.says(FIRST, SECOND, session=None)
    first = chat.says(FIRST)
    second = chat.strata("run", *MODEL, "-n", "40", "--session", "tale", "-p", SECOND, "--json")
    assert second.code == 0, second.stderr
    assert first.stdout + json.loads(second.stdout)["text"] + "\n" == whole.stdout
    shown = chat.strata("session", "show", "tale").stdout
    assert f"user: {FIRST}" in shown
    assert f"user: {SECOND}" in shown
    assert shown.count("assistant:") == 2


def test_sessions_are_listed_shown_and_removed(chat: Chat, root: Path) -> None:
    assert chat.strata("session", "ls").stdout == f"no sessions in {root}\n"
    chat.says(FIRST)
    chat.says(FIRST, session="other")
    listed = chat.strata("session", "ls").stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["session", "other", "tale"]
    assert "strata-demo-moe-Q8_0.gguf" in listed
    shown = json.loads(chat.strata("session", "show", "tale", "--json").stdout)
    assert shown["conversation"][0] == {"role": "user", "content": FIRST}
    assert shown["state"] == "ready"
    removed = chat.strata("session", "rm", "tale", "other")
    assert removed.stdout.startswith("removed tale, ")
    assert list(root.iterdir()) == []
    missing = chat.strata("session", "rm", "tale")
    assert (missing.code, "there is no session tale" in missing.stderr) == (2, True)


def test_a_session_in_use_is_refused_with_its_holder(chat: Chat, root: Path) -> None:
    chat.says(FIRST)
    with NamedLock(root / "tale" / "lock", "session tale"):
        for outcome in (chat.says(SECOND), chat.strata("session", "rm", "tale")):
            assert outcome.code == 2
            assert f"session tale is in use by process {os.getpid()}" in outcome.stderr
        assert f"in use by process {os.getpid()}" in chat.strata("session", "ls").stdout
    assert chat.says(SECOND).code == 0


def test_a_session_without_an_answer_leaves_nothing(chat: Chat, root: Path) -> None:
    assert chat.says("/help").code == 0
    assert list(root.iterdir()) == []


def test_a_damaged_session_is_refused_and_left_alone(chat: Chat, root: Path) -> None:
    chat.says(FIRST)
    document = root / "tale" / "session.json"
    document.write_bytes(document.read_bytes().replace(b"sun", b"moon"))
    before = document.read_bytes()
    outcome = chat.says(SECOND)
    assert outcome.code == 1
    assert "the session is damaged" in outcome.stderr
    assert document.read_bytes() == before
    assert "damaged" in chat.strata("session", "ls").stdout
    assert chat.strata("session", "show", "tale").code == 1
    assert chat.strata("session", "rm", "tale").code == 0


def test_a_session_of_a_newer_version_is_refused(chat: Chat, root: Path) -> None:
    chat.says(FIRST)
    document = root / "tale" / "session.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), "format": 9}))
    outcome = chat.says(SECOND)
    assert outcome.code == 1
    assert "format 9 is not supported" in outcome.stderr


def test_options_that_do_not_go_with_a_session_are_refused(chat: Chat) -> None:
    assert chat.says(FIRST, options=("--system", "You are brief.")).code == 0
    assert chat.says(SECOND, options=("--system", "You are brief.")).code == 0
    other = chat.says(SECOND, options=("--system", "You are long."))
    assert (other.code, "another system message" in other.stderr) == (2, True)
    assert chat.says(SECOND).code == 0
    raw = chat.strata("run", *MODEL, "--raw", "--session", "tale", "-p", "x")
    assert (raw.code, "--session keeps a conversation" in raw.stderr) == (2, True)
    name = chat.says(FIRST, session="../tale")
    assert (name.code, "cannot name a session" in name.stderr) == (2, True)
    size = chat.says(FIRST, session=None, options=("--prefix-cache", "lots"))
    assert (size.code, "'lots' is not a size" in size.stderr) == (2, True)


def test_prefixes_are_kept_unless_they_are_off(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.session_prefix.cache_folder", lambda: tmp_path / "cache")
    long = " ".join(f"word{number}" for number in range(60))
    off = chat.says(long, session=None, options=("--prefix-cache", "off"))
    assert not (tmp_path / "cache").exists()
    first, second = (chat.says(long, session=None, options=("--prefix-cache", "1GiB")) for _ in range(2))
    assert off.stdout == first.stdout == second.stdout
    assert len(list((tmp_path / "cache" / "prefixes").glob("*.kv"))) >= 2
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"{long} {end}"}) + "\n" for end in ("a", "b", "c")))
    for limit in ("off", "1GiB", "1GiB"):
        output = tmp_path / f"{limit}.jsonl"
        batch = chat.strata(
            "batch", *MODEL, "-n", "9", "--prefix-cache", limit, str(lines), "-o", str(output), "--overwrite"
        )
        assert batch.code == 0, batch.stderr
    texts = [
        [json.loads(line)["text"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("off.jsonl", "1GiB.jsonl")
    ]
    assert texts[0] == texts[1]
