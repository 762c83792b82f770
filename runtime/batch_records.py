"""The records a batch writes: one JSON object for each line answered.

Simple lines give `{"id", "line", "text", "finish_reason", "prompt_tokens", "completion_tokens", "request_sha256"}`, or
`{"id", "line", "error": {"code", "message"}, "request_sha256"}`. OpenAI-style lines give `{"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error", "request_sha256"}`, the body a `chat.completion` or a
`text_completion`. Fields of the request that were passed over are named in `ignored_fields`.

Knows nothing about files and engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.batch_lines import BatchLine, LineError
from runtime.batch_requests import BatchRequest


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """The answer to one request; `finish_reason` is "stop" or "length"."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def answer_record(line: BatchLine, completion: BatchAnswer, *, model_id: str, created: int) -> dict[str, Any]:
    """The record of an answered line; `created` in seconds since 1970."""
    if line.style == "openai":
        body = _response_body(line, completion, model_id, created)
        response = {"status_code": 200, "request_id": f"req_{line.sha256}", "body": body}
        record = {**_openai_head(line), "response": response, "error": None}
    else:
        record = {
            "id": line.request_id,
            "line": line.number,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
        }
    return {**record, **_tail(line)}


def error_record(line: BatchLine, error: LineError) -> dict[str, Any]:
    """The record of a line that cannot be answered."""
    reason = {"code": error.code, "message": error.message}
    if line.style == "openai":
        return {**_openai_head(line), "response": None, "error": reason, **_tail(line)}
    return {"id": line.request_id, "line": line.number, "error": reason, **_tail(line)}


def _openai_head(line: BatchLine) -> dict[str, Any]:
    """The fields by which a record of OpenAI's form is known."""
    return {"id": f"batch_req_{line.sha256}", "custom_id": line.request_id}


def _tail(line: BatchLine) -> dict[str, Any]:
    """What every record ends with."""
    ignored = {"ignored_fields": list(line.ignored_fields)} if line.ignored_fields else {}
    return {**ignored, "request_sha256": line.sha256}


def _response_body(line: BatchLine, completion: BatchAnswer, model_id: str, created: int) -> Mapping[str, Any]:
    """The body OpenAI's endpoint would have answered with."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": completion.finish_reason, "logprobs": None}
    is_chat = isinstance(line.request, BatchRequest) and not isinstance(line.request.prompt, str)
    if is_chat:
        choice["message"] = {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{line.sha256}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model_id,
        "choices": [choice],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        },
    }
