"""Speed of a model here: prompt and generation apart, repeated, with the columns of llama-bench.

Knows nothing of the terminal. A test is `ppN` (a prompt of N tokens is read), `tgN` (N tokens are generated one by
one), each after `depth` tokens of context; random token ids, so that no text decides the figures.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offload.cache_counts import CacheCounts
from offload.errors import RequestError
from runtime.engine import Engine
from runtime.executor.base import KVHandle, Step, WindowedKV
from runtime.sampler import SamplingParams
from runtime.trace import Trace


@dataclass(frozen=True, slots=True)
class BenchTest:
    """One line of the table: a prompt of `prompt_tokens`, or `generated_tokens` one by one, after `depth` tokens."""

    prompt_tokens: int
    generated_tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench names it."""
        test = f"pp{self.prompt_tokens}" if self.prompt_tokens else f"tg{self.generated_tokens}"
        return f"{test} @ d{self.depth}" if self.depth else test

    @property
    def rows(self) -> int:
        """KV rows that the test fills."""
        return self.depth + self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Tokens a second of every repetition of a test."""

    test: BenchTest
    tokens_per_s: tuple[float, ...]

    @property
    def average(self) -> float:
        """Mean over the repetitions."""
        return statistics.fmean(self.tokens_per_s)

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 for a single repetition."""
        return statistics.stdev(self.tokens_per_s) if len(self.tokens_per_s) > 1 else 0.0


def measure(
    engines: Sequence[Engine],
    test: BenchTest,
    *,
    repetitions: int,
    on_repetition: Callable[[int, int], None],
    trace: Trace | None = None,
) -> list[BenchResult]:
    """Run a test once on each engine to warm up and then `repetitions` times, the engines in turn.

    The context before a test is computed once and kept: each repetition goes back to its end. `trace` shows each run.
    """
    for engine in engines:
        if test.rows > engine.context_tokens:
            raise RequestError(
                f"{test.name} needs {test.rows} tokens of context; the plan reserves {engine.context_tokens}",
                hint=f"give -c {test.rows}",
            )
    ids = np.random.default_rng(1).integers(0, engines[0].tokenizer.vocab_size, test.rows).tolist()
    rates: list[list[float]] = [[] for _ in engines]
    caches = [_context(engine, test, ids) for engine in engines]
    for repetition in range(repetitions + 1):
        for engine, kv, samples in zip(engines, caches, rates, strict=True):
            seconds = _seconds(engine, kv, test, ids)
            if trace is not None:
                ended = time.perf_counter()
                trace.add(engine.plan.settings.loop, test.name, ended - seconds, ended, repetition=repetition)
            if repetition:
                samples.append((test.prompt_tokens + test.generated_tokens) / seconds)
        on_repetition(repetition, repetitions)
    return [BenchResult(test, tuple(samples)) for samples in rates]


def measure_drafted(
    engine: Engine, test: BenchTest, *, repetitions: int, on_repetition: Callable[[int, int], None]
) -> BenchResult:
    """Speed of answering with the engine's drafts: greedy tokens behind random ones, as many as the test generates.

    The answer's text decides what lookup finds; end-of-generation tokens are never drawn.
    """
    rng = np.random.default_rng(1)
    ids = rng.integers(0, engine.tokenizer.vocab_size, max(test.depth, 1)).tolist()
    sampling = SamplingParams(temperature=0, logit_bias=dict.fromkeys(engine.tokenizer.eog_ids, -math.inf))
    speeds = []
    for repetition in range(repetitions + 1):
        for _ in engine.generate(ids, max_tokens=test.generated_tokens, sampling=sampling):
            pass
        speed = engine.measured.decode_tokens_per_s if engine.measured is not None else None
        if speed is None:
            raise RequestError(f"{test.name} is too short for drafts", hint="give -n 16 or more")
        if repetition:
            speeds.append(speed)
        on_repetition(repetition, repetitions)
    return BenchResult(test, tuple(speeds))


def draft_columns(engine: Engine, *, drafted: bool) -> dict[str, Any]:
    """What a table with drafts has besides: of the last answer where it was `drafted`, else empty."""
    totals = engine.speculation.totals if engine.speculation is not None and drafted else None
    return {
        "draft": totals.draft if totals is not None else None,
        "acceptance_rate": totals.acceptance_rate if totals is not None else None,
        "tokens_per_pass": totals.tokens_per_pass if totals is not None else None,
    }


def stream_columns(engine: Engine, before: CacheCounts | None) -> dict[str, Any]:
    """What a table has besides for a model that is streamed from flash: of all that was run since `before`."""
    counts = engine.cache_counts
    return counts.since(before).as_dict() if counts is not None and before is not None else {}


def as_row(engine: Engine, result: BenchResult, peer: BenchResult | None = None) -> dict[str, Any]:
    """The result with llama-bench's column names; with a peer its speed, and the median ratio of the pairs."""
    plan = engine.plan
    row = {
        "model_filename": plan.model.path,
        "model_type": plan.model.architecture,
        "model_size": plan.model.byte_size,
        "model_n_params": plan.model.num_parameters,
        "backend": f"{plan.settings.loop} (simulated GPU)" if plan.is_simulated else plan.settings.loop,
        "gpu_info": plan.machine.gpu or "",
        "n_threads": plan.settings.threads,
        "n_prompt": result.test.prompt_tokens,
        "n_gen": result.test.generated_tokens,
        "n_depth": result.test.depth,
        "test": result.test.name,
        "avg_ts": result.average,
        "stddev_ts": result.deviation,
        "samples_ts": list(result.tokens_per_s),
    }
    if peer is not None:
        pairs = zip(result.tokens_per_s, peer.tokens_per_s, strict=True)
        row["peer_avg_ts"] = peer.average
        row["peer_samples_ts"] = list(peer.tokens_per_s)
        row["ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return row


def _context(engine: Engine, test: BenchTest, ids: list[int]) -> KVHandle:
    """A cache with room for the test, filled with the tokens before it."""
    kv = engine.executor.new_kv(test.rows)
    chunk = engine.plan.settings.prefill_chunk_tokens
    for start in range(0, test.depth, chunk):
        engine.executor.forward([Step(ids[start : min(start + chunk, test.depth)], kv)], logits="none")
    return kv


def _rewind(engine: Engine, kv: KVHandle, test: BenchTest, ids: list[int]) -> None:
    """Back to the context's end, some of which is computed again where a cache cannot be cut there."""
    kept = kv.cut_at(test.depth) if isinstance(kv, WindowedKV) else test.depth
    kv.truncate(kept)
    if kept < test.depth:
        engine.executor.forward([Step(ids[kept : test.depth], kv)], logits="none")


def _seconds(engine: Engine, kv: KVHandle, test: BenchTest, ids: list[int]) -> float:
    """Wall-clock of the test's own tokens, behind those of the context."""
    _rewind(engine, kv, test, ids)
    chunk = engine.plan.settings.prefill_chunk_tokens
    started = time.perf_counter()
    for start in range(test.depth, test.depth + test.prompt_tokens, chunk):
        end = min(start + chunk, test.depth + test.prompt_tokens)
        last = end == test.depth + test.prompt_tokens
        engine.executor.forward([Step(ids[start:end], kv)], logits="last" if last else "none")
    for position in range(test.depth + test.prompt_tokens, test.rows):
        engine.executor.forward([Step([ids[position]], kv)])
    return time.perf_counter() - started
