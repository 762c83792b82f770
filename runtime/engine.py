"""A model ready to answer: the plan, the weights it placed, the tokenizer and the loop that samples.

Knows nothing of terminals or files of prompts. Invariants: what a sequence yields does not depend on the others that
run beside it; the KV caches of all sequences together hold at most the plan's context.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_policy import KVPolicy
from offload.cache_counts import CacheCounts
from offload.closing import Closing, closed_on_error
from offload.errors import RequestError, SequenceError
from offload.gguf import GGUFFile
from offload.routing_trace import TraceRecorder, model_name
from planner.budget import Budget
from planner.cost import record_run
from planner.gpu_choice import FOUND
from planner.kv import kv_type
from planner.plan import Measurement, Plan
from planner.plan_check import check_runnable
from planner.solve import AUTO, plan_here
from runtime.backend import make_executor
from runtime.chat_template import ChatTemplate
from runtime.executor.base import GpuExecutor, RoutedExecutor, Step
from runtime.generation import Completion, Generation, Piece, Prompt, Request, check_prompt
from runtime.measured import measurement
from runtime.replan import Replan
from runtime.running_batch import RunningBatch, SizedRequest
from runtime.sampler import SamplingParams
from runtime.session import RowsSource, Session
from runtime.session_rows import RowsKeys
from runtime.shared_prefix import SharedPrefixes
from runtime.speculative.known import draft_wish
from runtime.speculative.options import DraftOptions
from runtime.speculative.speculation import Speculation, make_speculation
from runtime.stepper import Stepper
from runtime.text import ModelText
from runtime.tokenizer import Tokenizer
from runtime.trace import Trace

log = logging.getLogger("strata.engine")

Progress = Callable[[int, int], None]
"""Called with (done, total): bytes while loading, tokens while a prompt is read."""


class Engine(Closing):
    """Loads a GGUF file by a plan and answers prompts; a context manager.

    `source` is a path or an open file (which the engine then owns). Options left out are chosen by the planner;
    `loop` is "hybrid" (GPU and CPU), "program" (kernels on packed weights), "sequential" (the slow reference),
    "llama.cpp" (llama-cpp-python, the extra `peer`) or "auto"; `gpu` is "off", "auto" or the description of one that is
    to be simulated ("sim:vram=4GiB,bw=192GB/s,link=6GB/s,tflops=6"). `cache_type_k` and `cache_type_v` are the KV
    cache's types: f16, bf16, q8_0, q4_0, kivi4 or kivi2; "auto" is f16, or less where that does not fit. `kv_budget`
    has new tokens choose so many of its tokens to read, which can change answers. `kv_ram_bytes`: RAM for it, the rest
    of which lies on flash. `draft` says which drafts to decode with: answers are the same with and without.
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
        gpu: str = FOUND,
        cache_type_k: str = AUTO,
        cache_type_v: str = AUTO,
        kv_budget: int | None = None,
        kv_ram_bytes: int | None = None,
        chat_template: str | None = None,
        text: ModelText | None = None,
        draft: DraftOptions | None = None,
        on_load: Progress | None = None,
    ) -> None:
        self._gguf = source if isinstance(source, GGUFFile) else GGUFFile.open(source)
        self.text = text or ModelText(self._gguf, chat_template=chat_template)
        self.plan = (
            plan_here(
                self._gguf,
                context_tokens=context_tokens,
                threads=threads,
                budget=budget,
                loop=loop,
                gpu=gpu,
                kv=KVPolicy(
                    kv_type(cache_type_k, "cache_type_k"),
                    kv_type(cache_type_v, "cache_type_v"),
                    budget_tokens=kv_budget,
                ),
                kv_is_free=cache_type_k == cache_type_v == AUTO,
                kv_ram_bytes=kv_ram_bytes,
                drafts=draft_wish(draft or DraftOptions(), self._gguf, self.text.tokenizer),
            )
            if plan is None
            else check_runnable(plan, self._gguf)
        )
        self.executor = make_executor(self._gguf, self.plan, on_load=on_load)
        with closed_on_error(self.executor):
            self._drafts = make_speculation(draft or DraftOptions(), self._gguf, self.text, self.plan, self.executor)
        self._stepper = Stepper(self.plan, self.executor, self._drafts)
        self._prefixes = SharedPrefixes(self.executor)
        self.measured: Measurement | None = None
        self.rows: RowsSource | None = None  # of new sequences: where rows that were computed before may lie

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
    def shared_tokens(self) -> int:
        """Tokens of prompts so far that were computed for another prompt which began with them too."""
        return self._prefixes.tokens

    @property
    def replanned(self) -> tuple[Replan, ...]:
        """Where the runs so far departed from the plan, and why."""
        return tuple(self._stepper.replanner.replanned)

    def session(self) -> Session:
        """A KV cache for a conversation: pass it to `generate` so that only new tokens are computed."""
        return Session(self.executor.new_kv(self.context_tokens), self.rows)

    def rows_keys(self) -> RowsKeys:
        """What rows of KV that this engine computes are kept under."""
        return RowsKeys(self._gguf, self.plan)

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
        request = Request(prompt, sampling or SamplingParams(), tuple(stop), max_tokens)
        self._stepper.begin()
        generation = self._generation(request, self.prompt_ids(prompt), session or self.session())
        total = generation.timing.prompt_tokens
        read: CacheCounts | None = None
        if on_prefill is not None:
            on_prefill(0, total)
        try:
            while not generation.finished:
                if cancelled is not None and cancelled.is_set() and generation.wind_up():
                    break
                piece = self._stepper.advance([generation])[0]
                if piece is not None:
                    read = read or self.expert_counts
                    yield piece
                elif on_prefill is not None:
                    on_prefill(total - generation.prompt_tokens_left, total)
        finally:
            self._stepper.end(generation)
            self.measured = self._measurement(generation, read)
            log.info("seed %s, %s", generation.sampler.seed, generation.timing)
        if generation.error is not None:
            raise generation.error
        generation.session.keep()

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
        answers: dict[int, Completion] = {}
        for index, answer in self.stream_batch(requests):
            if isinstance(answer, SequenceError):
                raise answer
            answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    def stream_batch(
        self, requests: Iterable[Request], *, parallel: int = 8, cancelled: threading.Event | None = None
    ) -> Iterator[tuple[int, Completion | SequenceError]]:
        """Yield (index of the request, answer) as answers end, or why one could not; at most `parallel` run at once.

        A request waits until the KV rows it may need are free, so that all together stay within the plan's context, and
        while another computes what both begin with.
        `cancelled` ends the batch at a token boundary; unfinished answers are not yielded.
        """
        batch = RunningBatch(
            (self._sized(index, request) for index, request in enumerate(requests)),
            begin=self._generation,
            stepper=self._stepper,
            prefixes=self._prefixes,
            rows=self.rows,
            context_tokens=self.context_tokens,
            parallel=parallel,
        )
        self._stepper.begin()
        while not batch.is_over:
            yield from batch.start()
            if cancelled is not None and cancelled.is_set():
                return
            yield from batch.advance()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token of `ids`, computed from an empty cache: float32 (tokens, vocabulary)."""
        check_prompt(ids, self.tokenizer.vocab_size, len(ids) + 1)
        if len(ids) > self.context_tokens:
            raise RequestError(f"{len(ids)} tokens do not fit the context of {self.context_tokens}")
        kv = self.executor.new_kv(len(ids))
        chunk = self.plan.settings.prefill_chunk_tokens
        parts = (ids[start : start + chunk] for start in range(0, len(ids), chunk))
        return np.concatenate([self.executor.forward([Step(part, kv)], logits="all")[0] for part in parts])

    def record_routing(self) -> TraceRecorder:
        """Collects which experts tokens use from now on; RequestError where no program runs routed experts."""
        if not isinstance(self.executor, RoutedExecutor):
            raise RequestError(f"the {self.plan.settings.loop} loop records no routing", hint="use --loop program")
        return self.executor.record_routing(model_name(self._gguf))

    @property
    def speculation(self) -> Speculation | None:
        """The drafts that answers are decoded with."""
        return self._stepper.speculation

    def draft_with(self, speculation: Speculation | None) -> None:
        """Decode the next answers with those drafts, which stay their owner's to close; None: without."""
        self._stepper.speculation = speculation

    def trace(self, trace: Trace) -> None:
        """Show there what is done when, from now on."""
        self._stepper.trace(trace)

    def learn(self) -> Measurement | None:
        """Keep the last run's speeds beside the prediction, so that later predictions are corrected; returns them."""
        if self.measured is not None:
            record_run(self.plan, self._stepper.replanner.lesson(self.measured))
        if self.speculation is not None:
            self.speculation.learn()
        return self.measured

    def close(self) -> None:
        """Free weights and helper processes."""
        if self._drafts is not None:
            self._drafts.close()
        self.executor.close()
        self.text.close()
        self._gguf.close()

    def _sized(self, index: int, request: Request) -> SizedRequest:
        """The request with its token ids and the KV rows it may come to need."""
        ids = self.prompt_ids(request.prompt)
        check_prompt(ids, self.tokenizer.vocab_size, self.context_tokens)
        more = self.context_tokens if request.max_tokens is None else request.max_tokens
        return SizedRequest(index, request, ids, min(self.context_tokens, len(ids) + more))

    def _generation(self, request: Request, ids: Sequence[int], session: Session) -> Generation:
        """The state of an answer that begins."""
        begin = partial(Generation, self.tokenizer, prompt_ids=ids, stop=request.stop, max_tokens=request.max_tokens)
        generation = begin(session=session, sampling=request.sampling)
        if self._stepper.needs_answers:
            sampling = replace(request.sampling, seed=generation.sampler.seed)
            own = Session(self.executor.new_kv(generation.rows))
            self._stepper.foresee(generation, begin(session=own, sampling=sampling))
        return generation

    @property
    def cache_counts(self) -> CacheCounts | None:
        """What the cache of streamed weights has seen; None where all are in RAM."""
        return self.executor.cache_counts if isinstance(self.executor, RoutedExecutor) else None

    @property
    def expert_counts(self) -> CacheCounts | None:
        """Where experts were found: on the GPU, where its layers have some, else in the cache of streamed weights."""
        found = self.executor.gpu_expert_counts if isinstance(self.executor, GpuExecutor) else None
        return self.cache_counts if found is None else found

    def _measurement(self, generation: Generation, before: CacheCounts | None) -> Measurement:
        """`before`: when the prompt had been read."""
        counts = self.expert_counts if self.plan.model.expert_count else None
        gpu_bytes = self.executor.gpu_bytes if isinstance(self.executor, GpuExecutor) else None
        return measurement(generation, counts, before, gpu_bytes=gpu_bytes)
