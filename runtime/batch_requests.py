"""What a line of a batch file asks for: the prompt, and how to answer it.

Parameters: max_tokens, max_completion_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
frequency_penalty, penalty_last_n, logit_bias, seed, stop. What would change the answer but is not supported (n > 1,
tools, response_format, ...) is an error; what cannot change it (model, user, metadata, ...) is passed over; any other
field is passed over and named in the answer's `ignored_fields`.

A request without a seed gets one derived from the run's seed and the line's id, so that its answer depends neither on
its neighbours nor on when it was resumed. Knows nothing about files, engines or answers.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from offload.errors import RequestError
from runtime.sampler import SamplingParams, check_integer, shown
from runtime.stop_strings import checked_stops

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


def request_of(
    body: Mapping[str, Any], request_id: str, defaults: BatchDefaults
) -> tuple[BatchRequest, tuple[str, ...]]:
    """The request a body makes, and the fields of it that were passed over; RequestError."""
    for name, neutral in _UNSUPPORTED_FIELDS.items():
        if name in body and not any(type(body[name]) is type(value) and body[name] == value for value in neutral):
            raise RequestError(f"{name} is not supported in a batch")
    if ("prompt" in body) == ("messages" in body):
        raise RequestError("exactly one of prompt and messages is needed")
    prompt = _messages(body["messages"]) if "messages" in body else checked_text("prompt", body["prompt"])
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
        role = checked_text(f"the role of message {index}", message.get("role"))
        messages.append({**message, "role": role, "content": _content(index, message.get("content"))})
    return tuple(messages)


def _content(index: int, value: object) -> str:
    """The content of a message: a string, or text parts to be joined."""
    if not isinstance(value, list):
        return checked_text(f"the content of message {index}", value)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RequestError(f"message {index} has a content part that is not text")
        texts.append(checked_text(f"a content part of message {index}", part.get("text")))
    return "".join(texts)


def checked_text(name: str, value: object) -> str:
    """`value` as a string that UTF-8 can hold; RequestError."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} has half a surrogate pair at character {error.start}") from error
    return value
