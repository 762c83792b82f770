"""The engine as a batch sees it: what is refused before it starts, and how answers come back."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from offload.errors import RequestError
from runtime.batch_engine import EngineForBatch
from runtime.batch_records import BatchAnswer
from runtime.batch_requests import BatchRequest, PreparedRequest
from runtime.engine import Engine
from runtime.generation import Completion, Request
from runtime.sampler import SamplingParams


class StubEngine:
    """What `EngineForBatch` uses of an engine: one token a character, a context of 10."""

    tokenizer = SimpleNamespace(vocab_size=128)
    context_tokens = 10

    def prompt_ids(self, prompt: str) -> list[int]:
        return [ord(character) for character in prompt]

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.prompt_ids("".join(f"{message['role'][0]}{message['content']}" for message in messages))

    def stream_batch(
        self, requests: Iterable[Request], *, parallel: int, cancelled: threading.Event | None
    ) -> Iterator[tuple[int, Completion]]:
        assert (parallel, cancelled) == (3, None)
        for index, request in reversed(list(enumerate(requests))):
            tokens = len(request.prompt)
            yield index, Completion(f"{request.stop}{request.max_tokens}", (1,) * index, "stop", tokens)


def adapter() -> EngineForBatch:
    return EngineForBatch(cast(Engine, StubEngine()))


def test_prompts_become_token_ids() -> None:
    params = SamplingParams(seed=3)
    text = adapter().prepare(BatchRequest("ab", 4, params, ("x",)))
    assert text == PreparedRequest((97, 98), 4, params, ("x",))
    chat = adapter().prepare(BatchRequest(({"role": "user", "content": "b"},), None, params))
    assert chat.prompt_ids == (117, 98)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (BatchRequest("a" * 10, None, SamplingParams()), r"10 tokens.* context holds 10"),
        (BatchRequest("a", None, SamplingParams(logit_bias={128: 1.0})), "ids 0 to 127"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(request_: BatchRequest, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        adapter().prepare(request_)


def test_answers_keep_the_index_of_their_request() -> None:
    requests = [PreparedRequest((1,) * n, n, SamplingParams(), ("s",)) for n in (1, 2)]
    answers = list(adapter().complete_batch(requests, parallel=3, cancelled=None))
    assert answers == [(1, BatchAnswer("('s',)2", "stop", 2, 1)), (0, BatchAnswer("('s',)1", "stop", 1, 0))]
