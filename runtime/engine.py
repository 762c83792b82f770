"""A model ready to answer: the plan, the weights it placed, the tokenizer and the loop that samples.

Knows nothing of terminals or files of prompts. Invariants: what a sequence yields does not depend on the others that
run beside it; the KV caches of all sequences together hold at most the plan's context.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.cache_counts import CacheCounts
from offload.closing import Closing
from offload.errors import RequestError
from offload.gguf import GGUFFile
from offload.routing_trace import TraceRecorder, model_name
from planner.budget import Budget
from planner.cost import record_run
from planner.plan import Measurement, Plan
from planner.plan_check import check_runnable
from planner.solve import AUTO, plan_here
from runtime.backend import make_executor
from runtime.chat_template import ChatTemplate
from runtime.executor.base import RoutedExecutor, Step
from runtime.generation import Completion, Generation, Piece, Prompt, Request, check_prompt
from runtime.process import peak_ram_bytes
from runtime.replan import Replan, Replanner
from runtime.sampler import SamplingParams
from runtime.session import Session
from runtime.text import ModelText
from runtime.tokenizer import Tokenizer

log = logging.getLogger("strata.engine")

LEAST_LOOKUPS = 1000  # of experts, from which a hit rate is told
Progress = Callable[[int, int], None]
"""Called with (done, total): bytes while loading, tokens while a prompt is read."""


@dataclass(frozen=True, slots=True)
class _Sized:
    """A request, its token ids, and the KV rows it may need."""

    index: int
    request: Request
    ids: list[int]
    rows: int


class Engine(Closing):
    """Loads a GGUF file by a plan and answers prompts; a context manager.

    `source` is a path or an open file (which the engine then owns). Options left out are chosen by the planner;
    `loop` is "program" (kernels on packed weights), "sequential" (the slow reference), "llama.cpp" (llama-cpp-python,
    the extra `peer`) or "auto".
    """

    def __init__(
        self,
        source: str | Path | GGUFFile,
        plan: Plan | None = None,
        *,
        context_tokens: int | None = None,
        threads: int | None = None,
        budget: Budget | None = None,
        loop: str = AUTO,
        chat_template: str | None = None,
        text: ModelText | None = None,
        on_load: Progress | None = None,
    ) -> None:
        self._gguf = source if isinstance(source, GGUFFile) else GGUFFile.open(source)
        self.text = text or ModelText(self._gguf, chat_template=chat_template)
        self.plan = (
            plan_here(self._gguf, context_tokens=context_tokens, threads=threads, budget=budget, loop=loop)
            if plan is None
            else check_runnable(plan, self._gguf)
        )
        self.executor = make_executor(self._gguf, self.plan, on_load=on_load)
        self._replanner = Replanner(self.plan, self.executor)
        self.measured: Measurement | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file's own vocabulary."""
        return self.text.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The file's chat template, or the one that was given in its place."""
        return self.text.chat_template

    @property
    def model_id(self) -> str:
        """Names the model in answers and journals: the file's name."""
        return self._gguf.path.name

    @property
    def context_tokens(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.plan.settings.context_tokens

    @property
    def replanned(self) -> tuple[Replan, ...]:
        """Where the runs so far departed from the plan, and why."""
        return tuple(self._replanner.replanned)

    def session(self) -> Session:
        """A KV cache for a conversation: pass it to `generate` so that only new tokens are computed."""
        return Session(self.executor.new_kv(self.context_tokens))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text is encoded with the special tokens that the model wants, ids are taken as is."""
        return self.text.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation by the chat template; see `ModelText.chat_ids`."""
        return self.text.chat_ids(messages)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        cancelled: threading.Event | None = None,
        on_prefill: Progress | None = None,
    ) -> Iterator[Piece]:
        """Yield the answer piece by piece, one piece a token; the last one carries the reason it ended.

        `cancelled` is watched between tokens and prefill chunks. Speeds are in `measured` afterwards.
        """
        generation = Generation(
            self.tokenizer,
            session or self.session(),
            self.prompt_ids(prompt),
            sampling=sampling or SamplingParams(),
            stop=stop,
            max_tokens=max_tokens,
        )
        self._replanner.begin()
        total = generation.timing.prompt_tokens
        read: CacheCounts | None = None
        if on_prefill is not None:
            on_prefill(0, total)
        try:
            while not generation.finished:
                if cancelled is not None and cancelled.is_set() and generation.wind_up():
                    break
                piece = self._advance([generation])[0]
                if piece is not None:
                    read = read or self.cache_counts
                    yield piece
                elif on_prefill is not None:
                    on_prefill(total - generation.prompt_tokens_left, total)
        finally:
            self.measured = self._measurement(generation, read)
            log.info("seed %s, %s", generation.sampler.seed, generation.timing)

    def generate_batch(
        self,
        prompts: Sequence[Prompt | Request],
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Answers in the order of the prompts; the options are for prompts that are not a `Request` with its own."""
        default = sampling or SamplingParams()
        requests = [
            prompt if isinstance(prompt, Request) else Request(prompt, default, tuple(stop), max_tokens)
            for prompt in prompts
        ]
        answers = dict(self.stream_batch(requests))
        return [answers[index] for index in range(len(requests))]

    def stream_batch(
        self, requests: Iterable[Request], *, parallel: int = 8, cancelled: threading.Event | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, answer) as answers end; at most `parallel` run at once.

        A request waits until the KV rows it may need are free, so that all together stay within the plan's context.
        `cancelled` ends the batch at a token boundary; unfinished answers are not yielded.
        """
        waiting = (self._sized(index, request) for index, request in enumerate(requests))
        following = next(waiting, None)
        running: dict[int, Generation] = {}
        free_rows = self.context_tokens

        def room() -> int:
            """Sequences that may run at once: while RAM is short, no more than run already, but for one."""
            return min(parallel, max(len(running), 1)) if self._replanner.is_pressed else parallel

        while running or following is not None:
            while following is not None and len(running) < room() and following.rows <= free_rows:
                running[following.index] = self._start(following)
                free_rows -= following.rows
                following = next(waiting, None)
            if cancelled is not None and cancelled.is_set():
                return
            self._advance(list(running.values()))
            for index, generation in list(running.items()):
                if generation.finished:
                    del running[index]
                    free_rows += generation.rows
                    yield index, generation.completion()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token of `ids`, computed from an empty cache: float32 (tokens, vocabulary)."""
        check_prompt(ids, self.tokenizer.vocab_size, len(ids) + 1)
        if len(ids) > self.context_tokens:
            raise RequestError(f"{len(ids)} tokens do not fit the context of {self.context_tokens}")
        kv = self.executor.new_kv(len(ids))
        chunk = self.plan.settings.prefill_chunk_tokens
        steps = (Step(ids[start : start + chunk], kv) for start in range(0, len(ids), chunk))
        return np.concatenate([self.executor.forward([step], logits="all")[0] for step in steps])

    def record_routing(self) -> TraceRecorder:
        """Collects which experts tokens use from now on; RequestError where no program runs routed experts."""
        if not isinstance(self.executor, RoutedExecutor):
            raise RequestError(f"the {self.plan.settings.loop} loop records no routing", hint="use --loop program")
        return self.executor.record_routing(model_name(self._gguf))

    def learn(self) -> Measurement | None:
        """Keep the last run's speeds beside the prediction, so that later predictions are corrected; returns them."""
        if self.measured is not None:
            record_run(self.plan, self._replanner.lesson(self.measured))
        return self.measured

    def close(self) -> None:
        """Free weights and helper processes."""
        self.executor.close()
        self.text.close()
        self._gguf.close()

    def _advance(self, generations: Sequence[Generation]) -> list[Piece | None]:
        """One step of every sequence; its time is held against the plan."""
        replanner, started = self._replanner, time.perf_counter()
        decoding = all(generation.prompt_tokens_left == 0 for generation in generations)
        if not decoding:
            replanner.prompt_step()
        rows = self.executor.forward([generation.next_step(replanner.chunk_tokens) for generation in generations])
        pieces = [generation.advance(row[-1]) for generation, row in zip(generations, rows, strict=True)]
        if decoding:
            replanner.decoded(len(generations), time.perf_counter() - started)
        return pieces

    def _sized(self, index: int, request: Request) -> _Sized:
        """The request with its token ids and the KV rows it may come to need."""
        ids = self.prompt_ids(request.prompt)
        check_prompt(ids, self.tokenizer.vocab_size, self.context_tokens)
        wanted = self.context_tokens if request.max_tokens is None else len(ids) + request.max_tokens
        return _Sized(index, request, ids, min(self.context_tokens, wanted))

    def _start(self, sized: _Sized) -> Generation:
        request = sized.request
        session = Session(self.executor.new_kv(sized.rows))
        return Generation(
            self.tokenizer,
            session,
            sized.ids,
            sampling=request.sampling,
            stop=request.stop,
            max_tokens=request.max_tokens,
        )

    @property
    def cache_counts(self) -> CacheCounts | None:
        """What the cache of streamed weights has seen; None where all are in RAM."""
        return self.executor.cache_counts if isinstance(self.executor, RoutedExecutor) else None

    def _measurement(self, generation: Generation, before: CacheCounts | None) -> Measurement:
        """`before`: when the prompt had been read."""
        timing, counts = generation.timing, self.cache_counts
        decoding = counts.since(before) if counts is not None and before is not None else CacheCounts()
        return Measurement(
            decode_tokens_per_s=timing.decode_tokens_per_s,
            prefill_tokens_per_s=timing.prefill_tokens_per_s,
            ttft_s=timing.ttft_s,
            peak_ram_bytes=peak_ram_bytes(),
            prompt_tokens=timing.prompt_tokens,
            hit_rate=decoding.hit_rate if decoding.lookups >= LEAST_LOOKUPS and self.plan.model.expert_count else None,
        )
