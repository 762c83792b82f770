"""The lines of a batch file: reading them one at a time, and what each asks for.

A line is one of
- a JSON string: the prompt;
- `{"prompt": "..."}` or `{"messages": [...]}`, with `"id"` and any parameter of the list below beside it;
- OpenAI's batch form `{"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}`.

Parameters: max_tokens, max_completion_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
frequency_penalty, penalty_last_n, logit_bias, seed, stop. What would change the answer but is not supported (n > 1,
tools, response_format, ...) makes the line an error; what cannot change it (model, user, metadata, ...) is passed over;
any other field is passed over and named in the answer's `ignored_fields`.

A line without an id has the id `line-N`. A line without a seed gets one derived from the run's seed and the line's id,
so that its answer depends neither on its neighbours nor on when it was resumed.

Knows nothing about engines or output files. Invariant: memory is bounded by one line, however long the file is.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from offload.errors import RequestError
from runtime.sampler import SamplingParams, check_integer, shown
from runtime.stop_strings import checked_stops

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_ID_CHARACTERS = 512
MAX_NEW_TOKENS = 2**24

_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "penalty_last_n",
    "seed",
)
_OWN_FIELDS = {*_SAMPLING_FIELDS, "prompt", "messages", "max_tokens", "max_completion_tokens", "logit_bias", "stop"}
_HARMLESS_FIELDS = {"id", "model", "user", "metadata", "store", "service_tier", "stream", "stream_options"}
# Fields that would change the answer, with the values at which they do not.
_UNSUPPORTED_FIELDS: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
}
_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


@dataclass(frozen=True, slots=True)
class BatchDefaults:
    """What holds for lines that say nothing else; `max_tokens` None leaves the bound to the engine."""

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()

    def fingerprint(self, model_id: str) -> bytes:
        """Bytes that differ whenever the same line could be answered differently."""
        sampling = {name: getattr(self.sampling, name) for name in _SAMPLING_FIELDS}
        bias = sorted(self.sampling.logit_bias.items())
        return json.dumps([model_id, self.max_tokens, sampling, bias, self.stop]).encode()


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One prompt, as text or as the messages of a conversation, and how to answer it."""

    prompt: str | tuple[Mapping[str, Any], ...]
    max_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request whose prompt has become token ids."""

    prompt_ids: tuple[int, ...]
    max_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...] = ()


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
        request, ignored = _request(body, request_id, defaults)
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
    text = _text("the id", value)
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


def _request(body: Mapping[str, Any], request_id: str, defaults: BatchDefaults) -> tuple[BatchRequest, tuple[str, ...]]:
    """The request a body makes, and the fields of it that were passed over."""
    for name, neutral in _UNSUPPORTED_FIELDS.items():
        if name in body and not any(type(body[name]) is type(value) and body[name] == value for value in neutral):
            raise RequestError(f"{name} is not supported in a batch")
    if ("prompt" in body) == ("messages" in body):
        raise RequestError("exactly one of prompt and messages is needed")
    prompt = _messages(body["messages"]) if "messages" in body else _text("prompt", body["prompt"])
    if not prompt:
        raise RequestError("the prompt is empty")
    stop = body.get("stop")
    known = _OWN_FIELDS | _HARMLESS_FIELDS | _UNSUPPORTED_FIELDS.keys()
    request = BatchRequest(
        prompt=prompt,
        max_tokens=_max_tokens(body, defaults.max_tokens),
        sampling=_sampling(body, request_id, defaults.sampling),
        stop=defaults.stop if stop is None else checked_stops([stop] if isinstance(stop, str) else stop),
    )
    return request, tuple(sorted(name for name in body if name not in known))


def _max_tokens(body: Mapping[str, Any], default: int | None) -> int | None:
    """The bound on new tokens, under either of its names."""
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            check_integer(name, body[name], 1, MAX_NEW_TOKENS)
            return int(body[name])
    return default


def _sampling(body: Mapping[str, Any], request_id: str, defaults: SamplingParams) -> SamplingParams:
    """The run's sampling parameters with those the body names; fields that are null count as absent."""
    named = {name: body[name] for name in _SAMPLING_FIELDS if body.get(name) is not None}
    if "seed" not in named:
        digest = hashlib.sha256(f"{defaults.seed or 0}:{request_id}".encode()).digest()
        named["seed"] = int.from_bytes(digest[:8], "little")
    if body.get("logit_bias") is not None:
        named["logit_bias"] = _logit_bias(body["logit_bias"])
    return replace(defaults, **named)


def _logit_bias(value: object) -> dict[int, float]:
    """The bias with its keys, strings in JSON, as token ids; `SamplingParams` checks the rest."""
    if not isinstance(value, dict):
        raise RequestError(f"logit_bias must be an object, not {shown(value)}")
    for key in value:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(f"logit_bias has the key {shown(key)}, which is no token id")
    if any(not math.isfinite(bias) for bias in value.values() if isinstance(bias, float)):
        raise RequestError("logit_bias must hold finite numbers")
    return {int(key): bias for key, bias in value.items()}


def _messages(value: object) -> tuple[Mapping[str, Any], ...]:
    """The messages with the content of each as one string."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RequestError(f"messages must be a list, not {shown(value)}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise RequestError(f"message {index} must be an object, not {shown(message)}")
        role = _text(f"the role of message {index}", message.get("role"))
        messages.append({**message, "role": role, "content": _content(index, message.get("content"))})
    return tuple(messages)


def _content(index: int, value: object) -> str:
    """The content of a message: a string, or text parts to be joined."""
    if not isinstance(value, list):
        return _text(f"the content of message {index}", value)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RequestError(f"message {index} has a content part that is not text")
        texts.append(_text(f"a content part of message {index}", part.get("text")))
    return "".join(texts)


def _text(name: str, value: object) -> str:
    """`value` as a string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} has half a surrogate pair at character {error.start}") from error
    return value
