"""One step of the sequences that an engine answers: plain, or with drafts where a sequence is alone and drafts pay.

Knows nothing of prompts or text. Invariants: a step gives every sequence at most one token, and the same one with and
without drafts; its time is held against the plan.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from planner.plan import Plan
from runtime.executor.base import Executor
from runtime.generation import Generation, Piece
from runtime.replan import Replanner
from runtime.speculative.sequence import Passed, PlainTokens
from runtime.speculative.speculation import Speculation


class Stepper:
    """Steps of `executor`, which runs by `plan`; with `speculation`, if there is one, which is its owner's to close."""

    def __init__(self, plan: Plan, executor: Executor, speculation: Speculation | None) -> None:
        self.replanner = Replanner(plan, executor)
        self._executor = executor
        self.speculation = speculation
        self._alone: Generation | None = None  # the sequence for which drafts are put off
        self._plain_tokens = 0

    @property
    def needs_answers(self) -> bool:
        """Whether each answer must be known by `foresee` before it begins."""
        return self.speculation is not None and self.speculation.needs_answers

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
        """The next token of each, None for one whose prompt is not through."""
        if self.speculation is None:
            return self._plain(generations)
        if len(generations) > 1 or not generations[0].pieces:
            for generation in generations:
                self.speculation.settle(generation)
            self._alone = None
            return self._plain(generations)
        if self._alone is generations[0] and self._plain_tokens:
            self._plain_tokens -= 1
            return self._plain(generations)
        passed = self.speculation.next(generations[0])
        if isinstance(passed, PlainTokens):
            self._alone, self._plain_tokens = generations[0], passed.count - 1
            return self._plain(generations)
        return [self._take(generations[0], passed)]

    def end(self, generation: Generation) -> None:
        """The sequence is over, finished or not."""
        if self.speculation is not None:
            self.speculation.end(generation)
            self._alone = None

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
        rows = self._executor.forward([generation.next_step(replanner.chunk_tokens) for generation in generations])
        pieces = [generation.advance(row[-1]) for generation, row in zip(generations, rows, strict=True)]
        if decoding:
            replanner.decoded(len(generations), time.perf_counter() - started)
        return pieces
