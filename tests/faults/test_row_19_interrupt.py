"""Row 19: the first Ctrl-C stops at a token boundary and keeps what was said, the second ends with 130."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from runtime.cli import signals

COMMAND = (sys.executable, "-m", "runtime.cli", "run", "-m", "demo", "-t", "1", "--temp", "0", "-p", "Once upon a time")


def whole_answer(tokens: int) -> str:
    """The text of an uninterrupted run."""
    done = subprocess.run([*COMMAND, "-n", str(tokens), "-q"], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_row_19_the_first_signal_stops_at_a_token_boundary(number, tmp_path):
    whole = whole_answer(480).removesuffix("\n")
    answer = tmp_path / "answer.txt"
    with answer.open("wb") as stdout:
        process = subprocess.Popen([*COMMAND, "-n", "480"], stdout=stdout, stderr=subprocess.PIPE, text=True)
        while answer.stat().st_size < 12:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    said = answer.read_text(encoding="utf-8").removesuffix("\n")
    assert whole.startswith(said)
    assert len(said) < len(whole)
    assert "stopped at a token boundary" in errors
    assert "measured" in errors, "the speeds of what was done are shown"


def test_row_19_json_tells_that_the_answer_was_cut():
    process = subprocess.Popen(
        [*COMMAND, "--json", "-n", "500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.readline()  # the plan is shown: the handler is there
    process.send_signal(signal.SIGINT)
    document, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(document)["finish_reason"] == "cancelled"


def test_row_19_a_second_interrupt_ends_the_process_with_130(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with signals.stop_at_token_boundary() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.is_set()
        assert ended == []
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_row_19_a_second_sigterm_does_not_kill():
    with signals.stop_at_token_boundary() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.is_set()
