"""Row 28: malformed lines become error records with their number, the rest goes on; duplicate ids are refused first."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import RequestError
from runtime import batch_lines, batch_requests
from runtime.batch import BatchSummary, run_batch
from runtime.batch_lines import LineError, parse_line, read_lines
from runtime.batch_requests import BatchDefaults
from tests.support.batch_engine import FakeEngine

GOOD = b'{"prompt": "fine"}'


def run(tmp_path: Path, content: bytes) -> tuple[BatchSummary, dict[str, dict[str, Any]]]:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(content)
    summary = run_batch(FakeEngine(), source, output)
    records = [json.loads(line) for line in output.read_bytes().split(b"\n") if line]
    return summary, {record.get("custom_id", record["id"]): record for record in records}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "cut', "line 2 is not JSON"),
        (b"plain text", "line 2 is not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "line 2 is not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "line 2 is not JSON: NaN"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "line 2 is not JSON"),
        (b"17", "line 2 is neither a JSON object nor a string"),
        (b"[]", "line 2 is neither a JSON object nor a string"),
        (b'{"prompt": "\xff"}', "line 2 is not UTF-8: byte 12"),
        (b"[" * 200_000, "line 2 is nested too deeply"),
        (b'{"a":' * 200_000, "line 2 is nested too deeply"),
        (b"\0\0\0", "line 2 is not JSON"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_malformed_line(tmp_path: Path, line: bytes, reason: str) -> None:
    summary, records = run(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    assert summary == BatchSummary(3, 0, 2, 1, 0, False)
    error = records["line-2"]["error"]
    assert error["code"] == "malformed_line"
    assert error["message"].startswith(reason)
    assert records["line-2"]["line"] == 2
    assert records["line-1"]["text"] and records["line-3"]["text"]


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline(tmp_path: Path) -> None:
    summary, records = run(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n\n   \n" + GOOD)
    assert summary == BatchSummary(2, 0, 2, 0, 0, False)
    assert sorted(records) == ["line-1", "line-4"]


def test_an_empty_batch(tmp_path: Path) -> None:
    assert run(tmp_path, b"")[0] == BatchSummary(0, 0, 0, 0, 0, False)


def test_a_line_too_long_is_passed_over_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 65_536)
    long = b'{"prompt": "' + b"x" * 20_000_000 + b'"}'
    tracemalloc.start()
    try:
        summary, records = run(tmp_path, GOOD + b"\n" + long + b"\n" + GOOD)
    finally:
        tracemalloc.stop()
    assert summary.refused == 1
    assert records["line-2"]["error"]["message"] == "line 2 is longer than 65536 bytes"
    assert records["line-3"]["text"]


def test_reading_a_line_too_long_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 65_536)
    path = tmp_path / "in"
    path.write_bytes(b"x" * 20_000_000)
    tracemalloc.start()
    try:
        assert len(list(read_lines(path, BatchDefaults()))) == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"custom_id": "a", "body": {"prompt": "x"}}, {"custom_id": "a", "body": {"prompt": "y"}}),
        ({"id": "a", "prompt": "x"}, {"custom_id": "a", "body": {"prompt": "x"}}),
        ({"id": 5, "prompt": "x"}, {"id": "5", "prompt": "x"}),
        ({"prompt": "x"}, {"id": "line-1", "prompt": "x"}),
        ({"id": "a", "prompt": ""}, {"id": "a", "prompt": "x"}),
    ],
)
def test_duplicates_are_refused_before_anything_is_done(tmp_path: Path, first: object, second: object) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(f"{json.dumps(first)}\n{json.dumps('between')}\n{json.dumps(second)}\n")
    output.write_bytes(b"precious")
    engine = FakeEngine()
    with pytest.raises(RequestError, match=r"lines 1 and 3 of the batch have the same id"):
        run_batch(engine, source, output, overwrite=True)
    assert engine.drawn == 0
    assert output.read_bytes() == b"precious"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(batch_requests._OWN_FIELDS)) | st.sampled_from(
    ["id", "custom_id", "method", "url", "body", "n", "tools", "role", "content", "response_format"]
)
BODIES = st.dictionaries(NAMES, JSON | st.dictionaries(NAMES, JSON, max_size=4), max_size=6)


@settings(max_examples=120, deadline=None)
@given(line=st.binary(max_size=60) | (JSON | BODIES).map(lambda value: json.dumps(value).encode()))
def test_no_line_raises(line: bytes) -> None:
    parsed = parse_line(line, 3, "0", BatchDefaults())
    assert 1 <= len(parsed.request_id) <= 512
    if isinstance(parsed.request, LineError):
        assert "line 3" in parsed.request.message
