"""What is said on stderr while an answer is on its way to the same terminal."""

import logging

import pytest

from runtime.cli.console import set_up_logging, write_text


@pytest.mark.parametrize(
    ("is_terminal", "said", "shown"),
    [(True, "half a", "half a\n"), (True, "a line\n", "a line\n"), (False, "half a", "half a")],
)
def test_a_warning_begins_a_line_of_its_own(
    is_terminal: bool, said: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("strata")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    set_up_logging(0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    write_text(said)
    logging.getLogger("strata.test").warning("it is slow")
    told = capsys.readouterr()
    assert told.out == shown
    assert "it is slow" in " ".join(told.err.split())
