"""One step of the sequences that an engine answers: plain, or with drafts where they pay.

Knows nothing of prompts or text. Invariants: sequences get the same tokens with and without drafts, one that is alone
at most one a step; a step's time is held against the plan.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from offload.errors import SequenceError
from planner.plan import Plan
from runtime.executor.base import Executor, RoutedExecutor
from runtime.generation import Generation, Piece
from runtime.replan import Replanner
from runtime.speculative.pass_times import NEAR
from runtime.speculative.sequence import Passed, PlainTokens
from runtime.speculative.speculation import Speculation
from runtime.trace import Trace


class Stepper:
    """Steps of `executor`, which runs by `plan`; with `speculation`, if there is one, which is its owner's to close."""

    def __init__(self, plan: Plan, executor: Executor, speculation: Speculation | None) -> None:
        self.replanner = Replanner(plan, executor)
        self._executor = executor
        self.speculation = speculation
        self._trace: Trace | None = None
        self._idle: tuple[Generation, ...] = ()  # the sequences for which drafts are put off
        self._plain_tokens = 0  # that each still gets meanwhile
        self._idled = 0  # that each got
        self._computed_s = 0.0  # by the last plain step

    @property
    def needs_answers(self) -> bool:
        """Whether each answer must be known by `foresee` before it begins."""
        return self.speculation is not None and self.speculation.needs_answers

    def trace(self, trace: Trace) -> None:
        """Shows there what is done when, from now on."""
        self._trace = trace
        if self.speculation is not None:
            self.speculation.totals.trace = trace

    def begin(self) -> None:
        """A run begins: what it measures is told apart."""
        self.replanner.begin()
        if self.speculation is not None:
            self.speculation.begin()

    def foresee(self, generation: Generation, plain: Generation) -> None:
        """Decode `plain`, which is the same as `generation`, without drafts, for drafts that are made of it."""
        assert self.speculation is not None, "asked for by `needs_answers`"
        while not plain.finished:
            self._plain([plain])
        self.speculation.foresee(generation, plain.session.token_ids)
        generation.timing = replace(generation.timing, started_s=time.perf_counter())

    def advance(self, generations: Sequence[Generation]) -> list[Piece | None]:
        """The next token of each, None for one whose prompt is not through; the last of several with drafts.

        Where one of them cannot go on as it is (`SequenceError`) none gets a token: its lost rows are computed again by
        the next steps, or it ends.
        """
        try:
            return self._advance(generations)
        except SequenceError as error:
            lost = next((generation for generation in generations if generation.session.kv is error.kv), None)
            if lost is None:
                raise
            for generation in generations:
                if self.speculation is not None:
                    self.speculation.settle(generation)
            lost.lose_rows(error)
            return [None for _ in generations]

    def _advance(self, generations: Sequence[Generation]) -> list[Piece | None]:
        if self.speculation is None:
            return self._plain(generations)
        if self._idle == tuple(generations) and self._plain_tokens:
            self._plain_tokens -= 1
            self._idled += 1
            return self._idle_step(self.speculation, generations)
        self._end_idling()
        if not all(generation.pieces for generation in generations):
            for generation in generations:
                self.speculation.settle(generation)
            return self._plain(generations)
        passed = self._drafted(self.speculation, generations)
        if isinstance(passed, PlainTokens):
            self._idle, self._plain_tokens, self._idled = tuple(generations), passed.count - 1, 1
            return self._idle_step(self.speculation, generations)
        return passed

    def _idle_step(self, speculation: Speculation, generations: Sequence[Generation]) -> list[Piece | None]:
        """A step while drafts are put off; the first and the last ones are what drafts are held against."""
        pieces = self._plain(generations)
        if self._idled == 1 or self._plain_tokens < NEAR:
            speculation.passed_plainly(len(generations), self._computed_s)
        return pieces

    def _drafted(self, speculation: Speculation, generations: Sequence[Generation]) -> list[Piece | None] | PlainTokens:
        """A step with drafts, unless they are best put off."""
        if len(generations) > 1:
            pieces = speculation.next_of_several(generations)
            if not isinstance(pieces, PlainTokens):
                self.replanner.verified()
            return pieces
        passed = speculation.next(generations[0])
        return passed if isinstance(passed, PlainTokens) else [self._take(generations[0], passed)]

    def _end_idling(self) -> None:
        """Tell what several sequences got while drafts were off; one that is alone counts for itself."""
        if self.speculation is not None and len(self._idle) > 1:
            self.speculation.idled(len(self._idle), self._idled)
        self._idle = ()

    def end(self, generation: Generation) -> None:
        """The sequence is over, finished or not."""
        if self.speculation is not None:
            self._end_idling()
            self.speculation.end(generation)

    def _take(self, generation: Generation, passed: Passed) -> Piece | None:
        """The token of a row that came with drafts; a pass over one token is as any other step."""
        if passed.tokens == 1:
            self.replanner.decoded(1, passed.seconds)
        elif passed.tokens:
            self.replanner.verified()
        return generation.advance(passed.row)

    def _plain(self, generations: Sequence[Generation]) -> list[Piece | None]:
        replanner, started = self.replanner, time.perf_counter()
        decoding = all(generation.prompt_tokens_left == 0 for generation in generations)
        if not decoding:
            replanner.prompt_step()
        steps = [generation.next_step(replanner.chunk_tokens) for generation in generations]
        rows = self._executor.forward(steps)
        computed = time.perf_counter()
        self._computed_s = computed - started
        pieces = [generation.advance(row[-1]) for generation, row in zip(generations, rows, strict=True)]
        ended = time.perf_counter()
        if self._trace is not None:
            tokens = sum(len(step.token_ids) for step in steps)
            self._trace.add("compute", "decode" if decoding else "prefill", started, computed, tokens=tokens)
            self._trace.add("sample", "sample", computed, ended)
            self._count_reads(self._trace, ended)
        if decoding:
            replanner.decoded(len(generations), ended - started)
        return pieces

    def _count_reads(self, trace: Trace, at_s: float) -> None:
        """What flash has given by now."""
        counts = self._executor.cache_counts if isinstance(self._executor, RoutedExecutor) else None
        if counts is not None:
            trace.count("read from flash, MB", at_s, counts.bytes_read / 1e6)
