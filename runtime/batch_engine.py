"""The engine as a batch sees it: requests checked one by one, answers as they are finished.

Knows nothing about files. Invariant: a request that `prepare` let through does not end the batch.
"""

import threading
from collections.abc import Generator, Iterable

from offload.errors import StrataError
from runtime.batch_records import BatchAnswer
from runtime.batch_requests import BatchRequest, PreparedRequest
from runtime.engine import Engine
from runtime.generation import Request, check_prompt
from runtime.sampler import Sampler


class EngineForBatch:
    """`runtime.batch.BatchEngine` on top of an `Engine`, which stays the caller's to close."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def prepare(self, request: BatchRequest) -> PreparedRequest:
        """The request with its prompt as token ids.

        Raises `RequestError` where the prompt does not fit the context, the chat template refuses the messages, or a
        biased token is outside the vocabulary.
        """
        engine = self._engine
        prompt = request.prompt
        ids = engine.prompt_ids(prompt) if isinstance(prompt, str) else engine.chat_ids(prompt)
        check_prompt(ids, engine.tokenizer.vocab_size, engine.context_tokens)
        Sampler(request.sampling, engine.tokenizer.vocab_size)  # checks the ids of the bias
        return PreparedRequest(tuple(ids), request.max_tokens, request.sampling, request.stop)

    def complete_batch(
        self, requests: Iterable[PreparedRequest], *, parallel: int, cancelled: threading.Event | None
    ) -> Generator[tuple[int, BatchAnswer | StrataError], None, None]:
        """Answers with the indices of their requests, in the order in which they are finished."""
        prepared = (Request(one.prompt_ids, one.sampling, one.stop, one.max_tokens) for one in requests)
        for index, answer in self._engine.stream_batch(prepared, parallel=parallel, cancelled=cancelled):
            if isinstance(answer, StrataError):
                yield index, answer
                continue
            tokens = len(answer.token_ids)
            yield index, BatchAnswer(answer.text, answer.finish_reason, answer.prompt_tokens, tokens)
