"""Holds a run to its plan: where speed or memory turn out otherwise, says so and changes what can be changed.

What changes while sequences go on, their answers and caches untouched: the number of threads, found by a trial of a few
tokens each, and under memory pressure the size of prefill chunks and the room for weights that flash can bring again.
Everything else is the user's to change, and is named. One line a change in the log `strata.replan`. Knows nothing of
tokens' meaning, and reads no clock.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.budget import RAM_MARGIN_MIN_BYTES, format_size, free_ram
from planner.figures import figures, plural
from planner.plan import Plan
from planner.prediction import Measurement
from planner.ways import MIN_CHUNK_TOKENS
from runtime.drift import WINDOW_TOKENS, Drift, DriftWatch, ThreadTrial, other_threads
from runtime.executor.base import Executor, RoutedExecutor, ThreadedExecutor

log = logging.getLogger("strata.replan")

RETRY_TOKENS = 512  # after which the planned number of threads is tried again
RELIEF = 2  # times the margin: memory is no longer short
SLOW_ADVICE = "end other programs, or let the machine cool down; `strata plan` shows what binds"
MEMORY_ADVICE = "end other programs, or run again with a shorter context (-c) or a smaller --budget"

FreeRam = Callable[[], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Replan:
    """One departure from the plan. `token`: steps decoded before it; `change`: None where nothing could be changed."""

    token: int
    reason: str
    change: str | None
    advice: str | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.change or f'nothing to change here; {self.advice}'}"


class Replanner:
    """Watches the steps of one executor; `chunk_tokens` is how much of a prompt its next step may take."""

    def __init__(self, plan: Plan, executor: Executor, *, ram: FreeRam = free_ram) -> None:
        """`ram` tells (bytes free to this process, what limits them)."""
        self.replanned: list[Replan] = []
        self.chunk_tokens = plan.settings.prefill_chunk_tokens
        self.is_pressed = False
        self._plan = plan
        self._executor = executor if isinstance(executor, ThreadedExecutor) else None
        self._cached = executor if isinstance(executor, RoutedExecutor) else None
        self._ram = ram
        self._margin_bytes = plan.needs.ram.margin_bytes or RAM_MARGIN_MIN_BYTES
        self._watches = {1: DriftWatch(plan.predicted.decode_tokens_per_s)}
        self._trial: ThreadTrial | None = None
        self._threads = plan.settings.threads
        self._steps = 0
        self._tried_at = 0
        self._lanes = 0
        self.begin()

    def begin(self) -> None:
        """A run begins: what it measures is told apart by `lesson`."""
        self._prompt_as_planned = self._as_planned
        self._own_steps, self._own_seconds, self._all_own = 0, 0.0, True

    def prompt_step(self) -> None:
        """A part of a prompt is about to be computed: with the present threads, and the chunk there is room for."""
        if self._trial is not None:
            self._trial.restart()
            self._set_threads(self._trial.present)
        self._check_memory()
        self._prompt_as_planned = self._prompt_as_planned and self._as_planned

    def decoded(self, lanes: int, seconds: float) -> None:
        """One token of each of `lanes` sequences took that long."""
        self._steps += 1
        self._remember(seconds)
        if self._trial is not None:
            self._try(self._trial, lanes, seconds)
            return
        self._lanes = lanes
        drift = self._watches.setdefault(lanes, DriftWatch()).add(seconds / lanes)
        if drift is not None:
            self._answer(drift)
        elif self._threads < self._plan.settings.threads and self._steps - self._tried_at >= RETRY_TOKENS:
            self._begin_trial((self._plan.settings.threads,))
        if self._steps % WINDOW_TOKENS == 0:
            self._check_memory()

    def verified(self) -> None:
        """Drafted tokens were computed with another: what that took says nothing about the planned speed."""
        self._steps += 1
        self._all_own = False
        if self._trial is not None:
            self._trial.restart()
        if self._steps % WINDOW_TOKENS == 0:
            self._check_memory()

    def lesson(self, measured: Measurement) -> Measurement:
        """Of what a run measured that which was computed as the plan says, None for the rest."""
        speed = measured.decode_tokens_per_s
        if not self._all_own:
            speed = self._own_steps / self._own_seconds if self._own_steps >= WINDOW_TOKENS else None
        if self._prompt_as_planned:
            return replace(measured, decode_tokens_per_s=speed)
        return replace(measured, decode_tokens_per_s=speed, prefill_tokens_per_s=None, ttft_s=None)

    @property
    def _as_planned(self) -> bool:
        settings = self._plan.settings
        return (self._threads, self.chunk_tokens) == (settings.threads, settings.prefill_chunk_tokens)

    def _remember(self, seconds: float) -> None:
        if self._threads == self._plan.settings.threads and self._trial is None:
            self._own_steps += 1
            self._own_seconds += seconds
        else:
            self._all_own = False

    def _answer(self, drift: Drift) -> None:
        """Say what was found; where it is slow, begin to try other numbers of threads."""
        others = other_threads(self._threads, self._plan.settings.threads) if self._executor is not None else ()
        if not drift.is_slow:
            self._tell(str(drift), "later predictions are corrected by it", level=logging.INFO)
        elif others:
            numbers = " and ".join(map(str, others))
            self._tell(str(drift), f"trying {numbers} {plural(others[-1], 'thread')} in place of {self._threads}")
            self._begin_trial(others)
        else:
            self._tell(str(drift), None, SLOW_ADVICE)

    def _begin_trial(self, others: tuple[int, ...]) -> None:
        self._trial = ThreadTrial((self._threads, *others))

    def _try(self, trial: ThreadTrial, lanes: int, seconds: float) -> None:
        """One token of a trial."""
        if lanes != self._lanes:
            self._lanes = lanes
            trial.restart()
        else:
            trial.add(seconds)
        self._set_threads(trial.threads)
        if trial.done:
            self._end_trial(trial)

    def _end_trial(self, trial: ThreadTrial) -> None:
        self._trial, self._tried_at = None, self._steps
        speed, before = (self._lanes / max(trial.token_seconds(each), 1e-9) for each in (trial.fastest, trial.present))
        if trial.fastest != trial.present:
            threads = f"{trial.fastest} {plural(trial.fastest, 'thread')}"
            found = f"{figures(speed)} tokens/s with {threads}, {figures(before)} with {trial.present}"
            self._tell(found, f"{threads} from here on")
        elif trial.present == self._plan.settings.threads:
            self._tell("no other number of threads is faster", None, SLOW_ADVICE)
        self._watches = {self._lanes: DriftWatch(speed)}

    def _set_threads(self, threads: int) -> None:
        if self._executor is not None and threads != self._threads:
            self._executor.set_threads(threads)
            self._threads = threads

    def _check_memory(self) -> None:
        """Smaller chunks while less RAM is free than the plan's margin."""
        free, source = self._ram()
        planned = self._plan.settings.prefill_chunk_tokens
        if not self.is_pressed and free < self._margin_bytes:
            self.is_pressed = True
            margin = format_size(self._margin_bytes)
            reason = f"{format_size(free)} of RAM left by {source}, less than the margin of {margin}"
            smaller = planned > MIN_CHUNK_TOKENS
            self.chunk_tokens = min(planned, MIN_CHUNK_TOKENS)
            changes = [f"prompts in chunks of {self.chunk_tokens} tokens instead of {planned}"] if smaller else []
            if given := self._shrink(RELIEF * self._margin_bytes - free):
                changes.insert(0, f"{format_size(given)} of weights from flash given back")
            self._tell(reason, "; ".join(changes) or None, MEMORY_ADVICE)
        elif self.is_pressed and free >= RELIEF * self._margin_bytes:
            self.is_pressed = False
            self.chunk_tokens = planned
            self._shrink(0)
            self._tell(f"{format_size(free)} of RAM are free again", f"prompts in chunks of {planned} tokens")

    def _shrink(self, num_bytes: int) -> int:
        """Give back so much of what flash can bring again; 0: take it back."""
        return self._cached.shrink_cache(num_bytes) if self._cached is not None else 0

    def _tell(
        self, reason: str, change: str | None, advice: str | None = None, *, level: int = logging.WARNING
    ) -> None:
        replan = Replan(self._steps, reason, change, advice)
        self.replanned.append(replan)
        log.log(level, "%s", replan)
