"""Row 26: a prompt longer than the context becomes an error record with both numbers; the rest of the batch goes on."""

import json
from pathlib import Path

from runtime.batch import BatchSummary, run_batch
from tests.support.batch_engine import FakeEngine


def test_error_record_with_both_numbers(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    too_long = {"custom_id": "long", "body": {"messages": [{"role": "user", "content": "word " * 150}]}}
    lines = ["short", "word " * 120, too_long, "short again"]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out.jsonl"
    assert run_batch(FakeEngine(), source, output) == BatchSummary(4, 0, 2, 2, 0, False)
    records = {
        record.get("custom_id", record["id"]): record for record in map(json.loads, output.read_text().splitlines())
    }
    assert records["line-2"]["error"] == {
        "code": "invalid_request",
        "message": "line 2: the prompt has 120 tokens and the context holds 100",
    }
    assert "151 tokens and the context holds 100" in records["long"]["error"]["message"]
    assert records["line-4"]["text"]
    assert run_batch(FakeEngine(), source, output).resumed == 4  # a refusal is final
