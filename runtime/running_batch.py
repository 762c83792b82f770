"""Requests that are answered together: which run, which wait for room or for what another computes, and their answers.

Knows nothing of files or of how a step is computed. Invariant: the KV caches of all together hold at most
`context_tokens` rows, those of an answer that is kept for its prompt's sake included.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from offload.errors import SequenceError
from runtime.generation import Completion, Generation, Request
from runtime.session import RowsSource, Session
from runtime.shared_prefix import SharedPrefixes
from runtime.stepper import Stepper

Begin = Callable[[Request, Sequence[int], Session], Generation]


@dataclass(frozen=True, slots=True)
class SizedRequest:
    """A request, its place among all, its token ids, and the KV rows it may need."""

    index: int
    request: Request
    ids: list[int]
    rows: int


class RunningBatch:
    """Answers `waiting`, at most `parallel` at once; `begin` makes what runs of a request."""

    def __init__(
        self,
        waiting: Iterator[SizedRequest],
        *,
        begin: Begin,
        stepper: Stepper,
        prefixes: SharedPrefixes,
        rows: RowsSource | None,
        context_tokens: int,
        parallel: int,
    ) -> None:
        self._waiting = waiting
        self._following = next(waiting, None)
        self._begin, self._stepper, self._prefixes, self._rows = begin, stepper, prefixes, rows
        self._free_rows, self._parallel = context_tokens, parallel
        self._running: dict[int, Generation] = {}
        self._kept: Generation | None = None  # the last that ended: the next may begin as it did

    @property
    def is_over(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._running and self._following is None

    def start(self) -> Iterator[tuple[int, SequenceError]]:
        """Begins what there is room for; yields those that cannot begin."""
        while self._following is not None and len(self._running) < self._room() and self._has_rows(self._following):
            its, running = self._following, list(self._running.values())
            if self._prefixes.is_coming(its.ids, running):
                return
            others = running if self._kept is None else [*running, self._kept]
            try:
                session = self._prefixes.session(its.ids, its.rows, self._rows, others)
                self._running[its.index] = self._begin(its.request, its.ids, session)
                self._free_rows -= its.rows
            except SequenceError as error:
                yield its.index, error
            self._following = next(self._waiting, None)

    def advance(self) -> Iterator[tuple[int, Completion | SequenceError]]:
        """A step of all that run; yields those that ended."""
        if self._running:
            self._stepper.advance(list(self._running.values()))
        for index, generation in list(self._running.items()):
            if generation.finished:
                self._stepper.end(generation)
                del self._running[index]
                self._keep(generation)
                yield index, generation.error or generation.completion()

    def _keep(self, generation: Generation) -> None:
        """Its rows beyond it, if it ended well; and in this batch, while there is room."""
        self._give_back()
        if generation.error is None:
            generation.session.keep()
            self._kept = generation
        else:
            self._free_rows += generation.rows

    def _give_back(self) -> None:
        if self._kept is not None:
            self._free_rows += self._kept.rows
            self._kept = None

    def _has_rows(self, request: SizedRequest) -> bool:
        """Whether its rows are free, if need be in place of those that are kept."""
        if request.rows > self._free_rows:
            self._give_back()
        return request.rows <= self._free_rows

    def _room(self) -> int:
        """Sequences that may run at once: while RAM is short, no more than run already, but for one."""
        pressed = self._stepper.replanner.is_pressed
        return min(self._parallel, max(len(self._running), 1)) if pressed else self._parallel
