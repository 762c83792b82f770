"""Row 22: huge, negative and nonsensical numbers in a request are refused by name; nothing is allocated from them."""

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from offload.errors import RequestError
from runtime.batch_lines import LineError, parse_line
from runtime.batch_requests import BatchDefaults, BatchRequest
from runtime.sampler import Sampler, SamplingParams
from runtime.stop_strings import StopStrings

NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
INTEGERS = ["top_k", "penalty_last_n", "seed", "logprobs"]
NONSENSE: list[Any] = [1e308, -1e308, math.nan, math.inf, -math.inf, 10**400, -(10**400), "1", True, [], {}]


@pytest.mark.parametrize("name", NUMBERS + INTEGERS)
@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_sampling_parameters(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must be an? (number|integer) from \S+ to \S+, not ") as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "low", "high", "step"),
    [
        ("temperature", 0.0, 100.0, 0.001),
        ("top_k", 0, 2**31 - 1, 1),
        ("top_p", 0.0, 1.0, 0.001),
        ("min_p", 0.0, 1.0, 0.001),
        ("repetition_penalty", 0.01, 100.0, 0.001),
        ("presence_penalty", -100.0, 100.0, 0.001),
        ("frequency_penalty", -100.0, 100.0, 0.001),
        ("penalty_last_n", -1, 2**31 - 1, 1),
        ("seed", -(2**63), 2**64 - 1, 1),
        ("logprobs", 0, 20, 1),
    ],
)
def test_the_bounds_belong_to_the_range(name: str, low: Any, high: Any, step: Any) -> None:
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (low - step, high + step):
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: value})


def test_nothing_is_allocated_from_a_number() -> None:
    tracemalloc.start()
    try:
        params = SamplingParams(top_k=2**31 - 1, penalty_last_n=2**31 - 1, presence_penalty=1.0, logprobs=20)
        sampler = Sampler(params, 8, [1, 2])
        sampler.sample(np.zeros(8, dtype=np.float32), 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    "bias", [{-1: 0.0}, {2**31: 0.0}, {"1": 0.0}, {1: math.nan}, {1: 101}, {1: math.inf}, {1: None}, [1], None]
)
def test_logit_bias(bias: Any) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_logit_bias_is_bounded_in_number_and_vocabulary() -> None:
    with pytest.raises(RequestError, match="1025 entries; at most 1024"):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 0.0))
    with pytest.raises(RequestError, match=r"token 8; the vocabulary has ids 0 to 7"):
        Sampler(SamplingParams(logit_bias={8: 1.0}), 8)


def test_stop_strings() -> None:
    with pytest.raises(RequestError, match="17 stop strings were given; at most 16"):
        StopStrings(["x"] * 17)
    with pytest.raises(RequestError, match="1 to 256 characters, not 1000000"):
        StopStrings(["x" * 1_000_000])


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 10**30},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_completion_tokens": 2**24 + 1},
        {"temperature": -0.1},
        {"temperature": 1e400},
        {"top_k": -5},
        {"top_p": 1.01},
        {"seed": 2**64},
        {"n": 2},
        {"n": 10**30},
        {"best_of": 3},
        {"logprobs": True},
        {"logprobs": 10**9},
        {"top_logprobs": 5},
        {"stop": ["x"] * 17},
        {"stop": ["x" * 257]},
        {"stop": {"a": 1}},
        {"stop": [None]},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"9" * 11: 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 1000}},
        {"logit_bias": {"1": 1e999}},
        {"logit_bias": {"1": "2"}},
        {"logit_bias": [1]},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
    ],
    ids=str,
)
def test_fields_of_a_batch_line(fields: dict[str, Any]) -> None:
    line = json.dumps({"prompt": "x", **fields}).replace("Infinity", "1e999").encode()
    parsed = parse_line(line, 7, "0", BatchDefaults())
    assert isinstance(parsed.request, LineError)
    assert parsed.request.code == "invalid_request"
    assert parsed.request.message.startswith("line 7: ")
    assert any(name in parsed.request.message for name in (*fields, "stop string"))


def test_null_fields_count_as_absent() -> None:
    names = ["temperature", "max_tokens", "stop", "logit_bias", "seed", "n", "tools", "response_format", "logprobs"]
    line = json.dumps({"prompt": "x", **dict.fromkeys(names)}).encode()
    assert isinstance(parse_line(line, 1, "0", BatchDefaults()).request, BatchRequest)
