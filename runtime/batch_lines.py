"""The lines of a batch file, read one at a time.

A line is one of
- a JSON string: the prompt;
- `{"prompt": "..."}` or `{"messages": [...]}`, with `"id"` and any parameter of `batch_requests` beside it;
- OpenAI's batch form `{"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}`.

A line without an id has the id `line-N`. Knows nothing about engines or output files. Invariant: memory is bounded by
one line, however long the file is.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from offload.errors import RequestError
from runtime.batch_requests import BatchDefaults, BatchRequest, checked_text, request_of
from runtime.sampler import shown

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_ID_CHARACTERS = 512
_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a line cannot be answered."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of the input: its request, or why there is none. `sha256` identifies line, settings and model."""

    number: int
    request_id: str
    sha256: str
    style: Literal["simple", "openai"]
    request: BatchRequest | LineError
    ignored_fields: tuple[str, ...] = ()


def read_lines(path: str | os.PathLike[str], defaults: BatchDefaults, model_id: str = "") -> Iterator[BatchLine]:
    """Every line of the file at `path` that is not blank; malformed ones come with a `LineError`.

    Raises `RequestError` where the file cannot be read.
    """
    fingerprint = defaults.fingerprint(model_id)
    try:
        with Path(path).open("rb") as file:
            for number, (line, sha256) in enumerate(_raw_lines(file, fingerprint), start=1):
                if line is None:
                    message = f"line {number} is longer than {MAX_LINE_BYTES} bytes"
                    yield _malformed(number, sha256, message)
                elif line:
                    yield parse_line(line, number, sha256, defaults)
    except OSError as error:
        raise RequestError(f"cannot read the batch {path}: {error.strerror or error}") from error


def parse_line(line: bytes, number: int, sha256: str, defaults: BatchDefaults) -> BatchLine:
    """What one line asks for; a malformed line gives a `LineError`, never an exception."""
    try:
        value = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return _malformed(number, sha256, f"line {number} is not UTF-8: byte {error.start} of the line")
    except RecursionError:
        return _malformed(number, sha256, f"line {number} is nested too deeply")
    except ValueError as error:
        return _malformed(number, sha256, f"line {number} is not JSON: {error}")
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        return _malformed(number, sha256, f"line {number} is neither a JSON object nor a string")
    style: Literal["simple", "openai"] = "openai" if "custom_id" in value or "body" in value else "simple"
    request_id = f"line-{number}"
    try:
        request_id = _request_id(value.get("custom_id" if style == "openai" else "id"), request_id)
        body = _openai_body(value) if style == "openai" else value
        request, ignored = request_of(body, request_id, defaults)
    except RequestError as error:
        reason = LineError("invalid_request", f"line {number}: {error}")
        return BatchLine(number, request_id, sha256, style, reason)
    return BatchLine(number, request_id, sha256, style, request, ignored)


def _raw_lines(file: BinaryIO, fingerprint: bytes) -> Iterator[tuple[bytes | None, str]]:
    """Each line, stripped, and its digest; None in place of a line that is too long."""
    first = True
    while piece := file.readline(MAX_LINE_BYTES + 1):
        if first:
            piece, first = piece.removeprefix(b"\xef\xbb\xbf"), False
        digest = hashlib.sha256(fingerprint + b"\n" + piece.strip())
        too_long = len(piece) > MAX_LINE_BYTES
        while too_long and piece and not piece.endswith(b"\n"):
            piece = file.readline(MAX_LINE_BYTES)
            digest.update(piece)
        yield None if too_long else piece.strip(), digest.hexdigest()[:16]


def _malformed(number: int, sha256: str, message: str) -> BatchLine:
    """A line that tells nothing, not even its id."""
    return BatchLine(number, f"line-{number}", sha256, "simple", LineError("malformed_line", message))


def _refuse_constant(name: str) -> NoReturn:
    """NaN and the infinities are no JSON, though Python's parser knows them."""
    raise ValueError(f"{name} is not a JSON number")


def _request_id(value: object, default: str) -> str:
    """The id as a string; integers are taken too."""
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        value = shown(value)
    text = checked_text("the id", value)
    if not 1 <= len(text) <= MAX_ID_CHARACTERS:
        raise RequestError(f"the id must have 1 to {MAX_ID_CHARACTERS} characters, not {len(text)}")
    return text


def _openai_body(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `body` of an OpenAI-style line, its `method` and `url` checked."""
    body = line.get("body")
    if not isinstance(body, dict):
        raise RequestError("body must be an object")
    if line.get("method", "POST") != "POST":
        raise RequestError(f"method must be POST, not {shown(line['method'])}")
    url = line.get("url")
    if url is not None and (not isinstance(url, str) or url not in _URLS):
        raise RequestError(f"url must be one of {', '.join(_URLS)}, not {shown(url)}")
    if url is not None and _URLS[url] not in body:
        raise RequestError(f"body has no {_URLS[url]}, which {url} needs")
    return body
