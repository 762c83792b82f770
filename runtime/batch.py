"""Answering a file of prompts: every line once, whatever happens in between.

The output is the journal (`runtime.journal`): a line whose record is there is done, and starting the same batch again
goes on with the rest. Refused before any work: two lines with one id, and an output whose records do not belong to
this input with these settings and this model. Malformed lines become error records. An error of the request itself
(`RequestError`: a prompt longer than the context) is final and recorded too; any other failure of a request is logged,
not recorded, and so tried again by the next run.

Records stand in the order in which answers were finished. Seeds come from the lines (`runtime.batch_requests`), so an
answer does not depend on which others it was computed with, nor on resuming, as long as the engine's does not.

Knows nothing about models: it is handed an engine. Invariant: nothing counts as done before it is on the disk.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from offload.errors import RequestError, StrataError
from runtime.batch_lines import BatchLine, LineError, read_lines
from runtime.batch_records import BatchAnswer, answer_record, error_record
from runtime.batch_requests import BatchDefaults, BatchRequest, PreparedRequest
from runtime.journal import Journal
from runtime.sampler import check_integer

MAX_PARALLEL = 1024
_LOG = logging.getLogger("strata.batch")


class BatchEngine(Protocol):
    """What a batch needs of an engine."""

    def prepare(self, request: BatchRequest) -> PreparedRequest:
        """The request with its prompt as token ids; `RequestError` where it cannot be served."""

    def complete_batch(
        self, requests: Iterable[PreparedRequest], *, parallel: int, cancelled: threading.Event | None
    ) -> Generator[tuple[int, BatchAnswer | StrataError], None, None]:
        """Answer `requests`, at most `parallel` at once, each answer with its request's index, as they are finished.

        The requests are drawn lazily and by the calling thread. An error that concerns one request alone is its
        answer; an error that ends the batch is raised. `cancelled` ends the batch within a token; what was in flight
        then, or when the generator is closed, has no answer.
        """


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a run did: of `total` lines `resumed` were done before it, `answered` and `refused` (error records) by it.

    `failed` lines met an error not their own; they and, where `interrupted`, the rest are left to the next run.
    Its answers have `answer_tokens` tokens together, `seconds` after its beginning.
    """

    total: int
    resumed: int
    answered: int
    refused: int
    failed: int
    interrupted: bool
    answer_tokens: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def remaining(self) -> int:
        """Lines that have no record yet."""
        return self.total - self.resumed - self.answered - self.refused

    def describe(self) -> str:
        """One line for the user; it tells how to go on where something is left."""
        done = f"{self.answered} answered, {self.refused} refused, {self.resumed} done before, of {self.total}"
        if not self.remaining:
            return done
        reason = "interrupted" if self.interrupted else f"{self.failed} failed"
        return f"{done}; {reason}, {self.remaining} left: the same command goes on where this one stopped"


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the index of the input keeps of a line."""

    number: int
    sha256: str


def run_batch(
    engine: BatchEngine,
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    defaults: BatchDefaults | None = None,
    model_id: str = "",
    parallel: int = 1,
    overwrite: bool = False,
    cancelled: threading.Event | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BatchSummary:
    """Answer every line of `input_path` that `output_path` does not hold yet; up to `parallel` at once.

    `model_id` is part of what an answer is identified by, and the `model` of OpenAI-style answers. Where `cancelled`
    is set, or on Ctrl-C, the run ends, at latest with the record being written. `progress` gets lines done and lines
    in all. Raises `RequestError` for an input or output that will not do, `FlashError` where the output cannot be
    written.
    """
    check_integer("parallel", parallel, 1, MAX_PARALLEL)
    defaults = defaults or BatchDefaults()
    check_paths(Path(input_path), Path(output_path))
    index = _index(read_lines(input_path, defaults, model_id))
    with Journal(output_path, overwrite=overwrite) as journal:
        _check_resumable(journal, index)
        run = _Run(engine, journal, index, model_id, progress)
        interrupted = False
        resumed, began = len(journal.done), time.perf_counter()
        try:
            lines = read_lines(input_path, defaults, model_id)
            requests = run.requests(lines, cancelled)
            with closing(engine.complete_batch(requests, parallel=parallel, cancelled=cancelled)) as answers:
                for number, answer in answers:
                    run.record(number, answer)
            interrupted = cancelled is not None and cancelled.is_set()
        except KeyboardInterrupt:
            interrupted = True
    counts = (len(index), resumed, run.answered, run.refused, run.failed)
    summary = BatchSummary(*counts, interrupted, run.answer_tokens, time.perf_counter() - began)
    if summary.remaining > summary.failed and not interrupted:
        raise RequestError(f"the batch {input_path} changed while it was running: lines are missing")
    return summary


class _Run:
    """One run: which lines are with the engine, and what became of the others."""

    def __init__(
        self,
        engine: BatchEngine,
        journal: Journal,
        index: Mapping[str, _Entry],
        model_id: str,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.answered = self.refused = self.failed = self.answer_tokens = 0
        self._engine = engine
        self._journal = journal
        self._index = index
        self._model_id = model_id
        self._progress = progress
        self._pending: dict[int, BatchLine] = {}

    def requests(self, lines: Iterable[BatchLine], cancelled: threading.Event | None) -> Iterator[PreparedRequest]:
        """The requests of the lines not yet done; lines that cannot be answered are recorded in passing."""
        number = 0
        for line in lines:
            if cancelled is not None and cancelled.is_set():
                return
            entry = self._index.get(line.request_id)
            if entry is None or entry.sha256 != line.sha256:
                raise RequestError(f"line {line.number} of the batch changed while it was running")
            if line.request_id in self._journal.done:
                continue
            if isinstance(line.request, LineError):
                self._refuse(line, line.request)
                continue
            try:
                prepared = self._engine.prepare(line.request)
            except RequestError as error:
                self._refuse(line, LineError("invalid_request", f"line {line.number}: {error}"))
                continue
            self._pending[number] = line
            yield prepared
            number += 1

    def record(self, number: int, answer: BatchAnswer | StrataError) -> None:
        """Take the answer to the `number`-th request."""
        line = self._pending.pop(number)
        if isinstance(answer, RequestError):
            self._refuse(line, LineError("invalid_request", f"line {line.number}: {answer}"))
        elif isinstance(answer, StrataError):
            _LOG.warning("line %d (%s) failed and is left to the next run: %s", line.number, line.request_id, answer)
            self.failed += 1
            self._report()
        else:
            self._journal.append(answer_record(line, answer, model_id=self._model_id, created=int(time.time())))
            self.answered += 1
            self.answer_tokens += answer.completion_tokens
            self._report()

    def _refuse(self, line: BatchLine, error: LineError) -> None:
        """Record why a line has no answer."""
        self._journal.append(error_record(line, error))
        self.refused += 1
        self._report()

    def _report(self) -> None:
        """Tell how far the batch is."""
        if self._progress is not None:
            self._progress(len(self._journal.done), len(self._index))


def _index(lines: Iterable[BatchLine]) -> dict[str, _Entry]:
    """Every line's number and digest by its id; `RequestError` where two lines have one id."""
    index: dict[str, _Entry] = {}
    for line in lines:
        first = index.setdefault(line.request_id, _Entry(line.number, line.sha256))
        if first.number != line.number:
            raise RequestError(
                f"lines {first.number} and {line.number} of the batch have the same id {line.request_id!r}"
            )
    return index


def _check_resumable(journal: Journal, index: Mapping[str, _Entry]) -> None:
    """`RequestError` unless every record of the journal answers a line of the input, with the same settings."""
    for request_id, sha256 in journal.done.items():
        entry = index.get(request_id)
        if entry is not None and entry.sha256 == sha256:
            continue
        if entry is None:
            reason = f"answers {request_id!r}, which this batch does not have"
        else:
            reason = f"answered line {entry.number} ({request_id!r}) when it, the settings or the model were others"
        raise RequestError(f"{journal.path} {reason}", hint="choose another -o, or give --overwrite")


def check_paths(input_path: Path, output_path: Path) -> None:
    """`RequestError` unless the input can be read twice and is not the output, which has a folder."""
    if not input_path.exists():
        raise RequestError(f"there is no batch {input_path}", hint="give a file of one JSON request a line")
    if not input_path.is_file():
        raise RequestError(f"{input_path} is not a regular file", hint="write the requests to a file first")
    if output_path.exists() and output_path.samefile(input_path):
        raise RequestError(f"{output_path} is the batch itself", hint="choose another -o")
    if not output_path.parent.is_dir():
        raise RequestError(
            f"cannot write to {output_path}: there is no folder {output_path.parent}", hint="make it first"
        )
