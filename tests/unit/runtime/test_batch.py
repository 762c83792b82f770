"""Running a file of prompts: what lines may look like, what is written, what is refused, what a resume does."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from offload.errors import FlashError, RequestError, StrataError
from runtime.batch import BatchSummary, run_batch
from runtime.batch_lines import BatchLine, LineError, read_lines
from runtime.batch_requests import BatchDefaults, BatchRequest
from runtime.sampler import SamplingParams
from tests.support.batch_engine import FakeEngine

CHAT = {
    "custom_id": "chat-1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "any", "messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 5},
}


def write(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def records(path: Path) -> dict[str, dict[str, Any]]:
    """The records by id; two of one id fail."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            record = json.loads(line)
            assert found.setdefault(record.get("custom_id", record["id"]), record) is record
    return found


def parsed(tmp_path: Path, *values: object, defaults: BatchDefaults | None = None) -> list[BatchLine]:
    return list(read_lines(write(tmp_path / "in.jsonl", *values), defaults or BatchDefaults()))


def request_of(tmp_path: Path, value: object, defaults: BatchDefaults | None = None) -> BatchRequest:
    request = parsed(tmp_path, value, defaults=defaults)[0].request
    assert isinstance(request, BatchRequest), request
    return request


def error_of(tmp_path: Path, value: object) -> str:
    request = parsed(tmp_path, value)[0].request
    assert isinstance(request, LineError)
    return request.message


def test_the_forms_of_a_line(tmp_path: Path) -> None:
    values = ["Hello", {"prompt": "Hello"}, {"id": 7, "messages": [{"role": "user", "content": "Hi"}]}, CHAT]
    lines = parsed(tmp_path, *values)
    assert [line.request_id for line in lines] == ["line-1", "line-2", "7", "chat-1"]
    assert [line.style for line in lines] == ["simple", "simple", "simple", "openai"]
    prompts = [line.request.prompt for line in lines if isinstance(line.request, BatchRequest)]
    message = {"role": "user", "content": "Hi"}
    assert prompts == ["Hello", "Hello", (message,), ({"role": "user", "content": "Hi there"},)]


def test_parameters_come_from_the_line_and_else_from_the_defaults(tmp_path: Path) -> None:
    defaults = BatchDefaults(33, SamplingParams(temperature=0.5, top_k=7, seed=1), ("END",))
    plain = request_of(tmp_path, {"prompt": "x"}, defaults)
    assert (plain.max_tokens, plain.sampling.temperature, plain.sampling.top_k, plain.stop) == (33, 0.5, 7, ("END",))
    fields = {
        "max_tokens": 1, "max_completion_tokens": 2, "temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.25,
        "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": -1, "penalty_last_n": 9, "seed": 4,
        "logit_bias": {"5": -100}, "stop": "one",
    }  # fmt: skip
    request = request_of(tmp_path, {"prompt": "x", **fields}, defaults)
    assert request.sampling == SamplingParams(0, 3, 0.5, 0.25, 1.5, 1, -1, 9, {5: -100}, 4)
    assert (request.max_tokens, request.stop) == (2, ("one",))
    assert request_of(tmp_path, {"prompt": "x", "stop": ["a", "b"]}, defaults).stop == ("a", "b")


def test_seeds_come_from_the_run_and_the_id(tmp_path: Path) -> None:
    def seeds(*values: object, seed: int | None = None) -> list[int | None]:
        lines = parsed(tmp_path, *values, defaults=BatchDefaults(sampling=SamplingParams(seed=seed)))
        return [line.request.sampling.seed for line in lines if isinstance(line.request, BatchRequest)]

    first = seeds({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"})
    assert first[0] != first[1]
    assert seeds({"id": "b", "prompt": "y"}, {"id": "a", "prompt": "x"}) == first[::-1]
    assert seeds({"id": "a", "prompt": "x"}, seed=5) != first[:1]
    assert seeds({"id": "a", "prompt": "x", "seed": 9}) == [9]


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    request = request_of(tmp_path, {"messages": [{"role": "user", "name": "Zoë", "content": parts}]})
    assert request.prompt == ({"role": "user", "name": "Zoë", "content": "Hello"},)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"messages": []}, "the prompt is empty"),
        ({}, "exactly one of prompt and messages"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, "exactly one of prompt and messages"),
        ({"prompt": ["x"]}, "prompt must be a string, not a list"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"messages": "x"}, "messages must be a list"),
        ({"messages": ["x"]}, "message 0 must be an object"),
        ({"messages": [{"content": "x"}]}, "the role of message 0 must be a string"),
        ({"messages": [{"role": "user"}]}, "the content of message 0 must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content part that is not text"),
        ({"prompt": "x", "id": ["y"]}, "the id must be a string"),
        ({"prompt": "x", "id": ""}, "1 to 512 characters, not 0"),
        ({"prompt": "x", "id": "y" * 513}, "1 to 512 characters, not 513"),
        ({"custom_id": "a"}, "body must be an object"),
        ({**CHAT, "method": "GET"}, "method must be POST, not 'GET'"),
        ({**CHAT, "url": "/v1/embeddings"}, "url must be one of"),
        ({**CHAT, "url": "/v1/completions"}, "body has no prompt"),
    ],
)
def test_what_a_line_may_not_be(tmp_path: Path, value: object, reason: str) -> None:
    message = error_of(tmp_path, value)
    assert message.startswith("line 1: ")
    assert reason in message


def test_simple_records(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"id": "a", "prompt": "one two three", "bogus": 1, "user": "u"}, {"prompt": ""})
    summary = run_batch(FakeEngine(), source, tmp_path / "out")
    assert summary == BatchSummary(2, 0, 1, 1, 0, False)
    assert summary.describe() == "1 answered, 1 refused, 0 done before, of 2"
    answer, error = records(tmp_path / "out").values()
    if "error" in answer:
        answer, error = error, answer
    assert list(answer) == [
        "id", "line", "text", "finish_reason", "prompt_tokens", "completion_tokens", "ignored_fields", "request_sha256",
    ]  # fmt: skip
    assert (answer["id"], answer["line"], answer["prompt_tokens"], answer["completion_tokens"]) == ("a", 1, 3, 4)
    assert answer["ignored_fields"] == ["bogus"]
    assert error["error"] == {"code": "invalid_request", "message": "line 2: the prompt is empty"}
    assert (error["id"], error["line"]) == ("line-2", 2)


def test_openai_records(tmp_path: Path) -> None:
    text = {"custom_id": "text-1", "url": "/v1/completions", "body": {"prompt": "one two"}}
    bad = {"custom_id": "bad-1", "body": {"prompt": "x", "n": 3}}
    run_batch(FakeEngine(), write(tmp_path / "in", CHAT, text, bad), tmp_path / "out", model_id="tiny.gguf")
    found = records(tmp_path / "out")
    chat = found["chat-1"]
    assert chat["id"] == f"batch_req_{chat['request_sha256']}"
    assert chat["error"] is None
    assert chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert (body["object"], body["model"], body["choices"][0]["finish_reason"]) == (
        "chat.completion",
        "tiny.gguf",
        "stop",
    )
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert found["text-1"]["response"]["body"]["object"] == "text_completion"
    assert found["text-1"]["response"]["body"]["choices"][0]["text"].endswith("🙂\n")
    assert found["bad-1"]["response"] is None
    assert found["bad-1"]["error"]["message"] == "line 3: n is not supported in a batch"


@pytest.mark.parametrize("parallel", [1, 3, 100])
def test_answers_do_not_depend_on_parallelism(tmp_path: Path, parallel: int) -> None:
    source = write(tmp_path / "in", *(f"prompt {i}" for i in range(20)))
    engine = FakeEngine()
    run_batch(engine, source, tmp_path / "out", parallel=parallel)
    run_batch(FakeEngine(), source, tmp_path / "alone")
    assert records(tmp_path / "out") == records(tmp_path / "alone")
    assert engine.most_in_flight == min(parallel, 20)


def test_a_second_run_does_only_what_is_new(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "a", "b")
    run_batch(FakeEngine(), source, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    engine = FakeEngine()
    assert run_batch(engine, source, tmp_path / "out").resumed == 2
    assert engine.drawn == 0
    assert (tmp_path / "out").read_bytes() == before
    write(source, "a", "b", "c")
    assert run_batch(engine, source, tmp_path / "out") == BatchSummary(3, 2, 1, 0, 0, False)


@pytest.mark.parametrize("change", ["line", "settings", "model", "fewer"])
def test_an_output_of_other_requests_is_refused(tmp_path: Path, change: str) -> None:
    source = write(tmp_path / "in", "a", "b")
    output = tmp_path / "out"
    run_batch(FakeEngine(), source, output, model_id="m")
    before = output.read_bytes()
    if change in ("line", "fewer"):
        write(source, "a", *(["changed"] if change == "line" else []))
    defaults = BatchDefaults(max_tokens=3) if change == "settings" else None
    model_id = "other" if change == "model" else "m"
    reason = "which this batch does not have" if change == "fewer" else "when it, the settings or the model were others"
    with pytest.raises(RequestError, match=reason) as caught:
        run_batch(FakeEngine(), source, output, defaults=defaults, model_id=model_id)
    assert "--overwrite" in str(caught.value.hint)
    assert output.read_bytes() == before
    summary = run_batch(FakeEngine(), source, output, defaults=defaults, model_id=model_id, overwrite=True)
    assert (summary.resumed, summary.remaining) == (0, 0)


def test_paths_that_will_not_do(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "a")
    with pytest.raises(RequestError, match="there is no batch"):
        run_batch(FakeEngine(), tmp_path / "none", tmp_path / "out")
    with pytest.raises(RequestError, match="not a regular file"):
        run_batch(FakeEngine(), tmp_path, tmp_path / "out")
    with pytest.raises(RequestError, match="is the batch itself"):
        run_batch(FakeEngine(), source, source, overwrite=True)
    assert source.read_text() == '"a"\n'
    assert not (tmp_path / "out").exists()
    for parallel in (0, -1, 10**9):
        with pytest.raises(RequestError, match="parallel must be an integer"):
            run_batch(FakeEngine(), source, tmp_path / "out", parallel=parallel)
    with pytest.raises(RequestError, match="cannot read the batch"):
        list(read_lines(tmp_path, BatchDefaults()))


@pytest.mark.parametrize("last", ['"B"', '"b" ', ""])
def test_a_batch_that_changes_under_the_run_is_refused(tmp_path: Path, last: str) -> None:
    source = tmp_path / "in"
    head = json.dumps("a") + "\n" + " " * 300_000 + "\n"  # longer than the block that is read ahead
    source.write_text(head + '"b"\n')
    engine = FakeEngine()

    def rewrite(done: int, total: int) -> None:
        source.write_text(head + last + "\n")

    if last.strip() == '"b"':
        assert run_batch(engine, source, tmp_path / "out", progress=rewrite).answered == 2
    else:
        with pytest.raises(RequestError, match=r"changed while it was running"):
            run_batch(engine, source, tmp_path / "out", progress=rewrite)
        assert engine.drawn == 1


def test_cancelling_keeps_what_is_done(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(f"prompt {i}" for i in range(10)))
    cancelled = threading.Event()

    def cancel(done: int, total: int) -> None:
        assert total == 10
        if done == 4:
            cancelled.set()

    summary = run_batch(FakeEngine(), source, tmp_path / "out", parallel=3, cancelled=cancelled, progress=cancel)
    assert (summary.answered, summary.interrupted, summary.remaining) == (4, True, 6)
    assert summary.describe().endswith("interrupted, 6 left: the same command goes on where this one stopped")
    assert run_batch(FakeEngine(), source, tmp_path / "out").answered == 6
    assert len(records(tmp_path / "out")) == 10


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "a", "b", "c")

    def interrupt(text: str) -> None:
        if text == "b":
            raise KeyboardInterrupt

    summary = run_batch(FakeEngine(fault=interrupt), source, tmp_path / "out")
    assert (summary.answered, summary.interrupted) == (1, True)


def test_failures_that_are_not_the_requests_are_left_to_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "in", "good", "flash", "refused")

    def fault(text: str) -> StrataError | None:
        return {"flash": FlashError("read failed"), "refused": RequestError("will not")}.get(text)

    summary = run_batch(FakeEngine(fault=fault), source, tmp_path / "out")
    assert summary == BatchSummary(3, 0, 1, 1, 1, False)
    assert "1 failed, 1 left" in summary.describe()
    assert "line 2 (line-2) failed and is left to the next run: read failed" in caplog.text
    assert records(tmp_path / "out")["line-3"]["error"]["message"] == "line 3: will not"
    assert run_batch(FakeEngine(), source, tmp_path / "out") == BatchSummary(3, 2, 1, 0, 0, False)


def test_an_engine_that_breaks_ends_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "a", "b")

    def fault(text: str) -> StrataError | None:
        if text == "b":
            raise FlashError("the model is gone")
        return None

    with pytest.raises(FlashError, match="gone"):
        run_batch(FakeEngine(fault=fault), source, tmp_path / "out")
    assert list(records(tmp_path / "out")) == ["line-1"]
    assert run_batch(FakeEngine(), source, os.fspath(tmp_path / "out")).remaining == 0
