"""A batch engine without a model: answers that depend on the request alone, as slowly and as brokenly as asked."""

import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable

from offload.errors import RequestError, StrataError
from runtime.batch_records import BatchAnswer
from runtime.batch_requests import BatchRequest, PreparedRequest

CONTEXT_TOKENS = 100


class FakeEngine:
    """One token a word; the answer is a digest of prompt, seed and bounds. Finishes its requests last in, first out."""

    def __init__(self, *, delay_s: float = 0.0, fault: Callable[[str], StrataError | None] | None = None) -> None:
        self.delay_s = delay_s
        self.fault = fault or (lambda text: None)
        self.drawn = 0
        self.most_in_flight = 0
        self._texts: dict[tuple[int, ...], str] = {}

    def prepare(self, request: BatchRequest) -> PreparedRequest:
        """Words as tokens; a prompt of more than 100 words does not fit."""
        prompt = request.prompt
        text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        ids = tuple(zlib.crc32(word.encode()) for word in text.split())
        if len(ids) >= CONTEXT_TOKENS:
            raise RequestError(f"the prompt has {len(ids)} tokens and the context holds {CONTEXT_TOKENS}")
        self._texts[ids] = text
        return PreparedRequest(ids, request.max_tokens, request.sampling, request.stop)

    def complete_batch(
        self, requests: Iterable[PreparedRequest], *, parallel: int, cancelled: threading.Event | None
    ) -> Generator[tuple[int, BatchAnswer | StrataError], None, None]:
        """Fill up to `parallel` slots, answer the newest, and so on."""
        waiting = enumerate(requests)
        running: list[tuple[int, PreparedRequest]] = []
        while True:
            while len(running) < parallel and (item := next(waiting, None)) is not None:
                running.append(item)
                self.drawn += 1
            self.most_in_flight = max(self.most_in_flight, len(running))
            if not running or (cancelled is not None and cancelled.is_set()):
                return
            time.sleep(self.delay_s)
            index, request = running.pop()
            yield index, self._answer(request)

    def _answer(self, request: PreparedRequest) -> BatchAnswer | StrataError:
        text = self._texts[request.prompt_ids]
        error = self.fault(text)
        if error is not None:
            return error
        settings = f"{text}|{request.max_tokens}|{request.sampling}|{request.stop}"
        words = hashlib.sha256(settings.encode()).hexdigest()
        return BatchAnswer(f"{words} äöü 🙂\n", "stop", len(request.prompt_ids), 4)
