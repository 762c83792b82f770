"""A model that answers: plans where it is not told how, loads by the plan, and steps the sequences of each answer.

Knows nothing of terminals or files of prompts. Invariants: what a sequence yields does not depend on the others that
run beside it; the KV caches of all sequences together hold at most the plan's context.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cpu_kernels.kv_policy import KVPolicy
from offload.errors import SequenceError
from offload.gguf import GGUFFile
from planner.budget import Budget
from planner.cost import record_run
from planner.gpu_choice import FOUND
from planner.kv import kv_type
from planner.plan import Plan
from planner.plan_check import check_runnable
from planner.prediction import Measurement
from planner.solve import AUTO, plan_here
from runtime.generation import Completion, Generation, Piece, Prompt, Request, check_prompt
from runtime.loaded_model import LoadedModel, Progress
from runtime.measured import ExpertCounts, measurement
from runtime.replan import Replan
from runtime.running_batch import RunningBatch, SizedRequest
from runtime.sampler import SamplingParams
from runtime.session import RowsSource, Session
from runtime.shared_prefix import SharedPrefixes
from runtime.speculative.known import draft_wish
from runtime.speculative.options import DraftOptions
from runtime.speculative.speculation import Speculation
from runtime.stepper import Stepper
from runtime.text import ModelText
from runtime.trace import Trace

log = logging.getLogger("strata.engine")


class Engine(LoadedModel):
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
        gguf = source if isinstance(source, GGUFFile) else GGUFFile.open(source)
        text, draft = text or ModelText(gguf, chat_template=chat_template), draft or DraftOptions()
        if plan is None:
            plan = plan_here(
                gguf,
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
                drafts=draft_wish(draft, gguf, text.tokenizer),
            )
        else:
            check_runnable(plan, gguf)
        super().__init__(gguf, text, plan, draft=draft, on_load=on_load)
        self._stepper = Stepper(self.plan, self.executor, self._drafts)
        self._prefixes = SharedPrefixes(self.executor)
        self.measured: Measurement | None = None
        self.rows: RowsSource | None = None  # of new sequences: where rows that were computed before may lie

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
        read: ExpertCounts | None = None
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

    def _measurement(self, generation: Generation, before: ExpertCounts | None) -> Measurement:
        """`before`: when the prompt had been read."""
        counts = self.expert_counts if self.plan.model.expert_count else None
        return measurement(generation, counts, before, gpu_bytes=self.gpu_bytes)
