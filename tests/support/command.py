"""Runs the command `strata` inside the test's process."""

import io
import sys
from dataclasses import dataclass

import pytest

from runtime.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit code."""

    code: int
    stdout: str
    stderr: str


def strata(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: str = ""
) -> Outcome:
    """The outcome of `strata ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["strata", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)
