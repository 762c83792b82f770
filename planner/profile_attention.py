"""How fast this machine's attention goes through keys and values of a type: of one token, and of a prompt's tokens.

Measured in a process of its own, so that neither its memory nor the compiler it imports counts as the caller's. Knows
nothing about models.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from planner.apart import FAILURES, measured_apart
from planner.machine import AttentionPoint
from planner.profile import Profile, ensured

log = logging.getLogger("strata.planner.profile_attention")

# The shape of most models' heads: four queries share a key.
KV_HEADS, GROUP, LENGTH = 8, 4, 64
DEPTH_TOKENS = 8192
PROMPT_TOKENS, PROMPT_DEPTH_TOKENS = 64, 2048
RAM_BYTES = 96 << 20  # gone through again and again: more than caches hold
PAGE_BYTES = 4096
_SAMPLE_BYTE = 0x35  # of ordinary numbers and scales in every type
_SECONDS_A_POINT = 0.1
_LEAST_RUNS = 3
_LIMIT_S = 120


@dataclass(frozen=True, slots=True)
class AttentionRates:
    """Points by the names of types of the KV cache."""

    types: Mapping[str, tuple[AttentionPoint, ...]] = field(default_factory=dict)


def with_attention_rates(profile: Profile, policy: KVPolicy, path: Path | None = None) -> Profile:
    """`profile` with the rates of attention over a policy's types; new ones are measured and stored."""
    kinds = {kind.value for layer in (0, 1) for kind in policy.of_layer(layer, 3)}  # of an edge, and within

    def measured(known: Profile) -> Profile:
        found = measure_apart(sorted(kinds - known.attention.keys()), known.threads)
        return replace(known, attention={**known.attention, **found.types})

    return ensured(profile, lambda known: kinds <= known.attention.keys(), measured, path)


def measure_apart(types: Sequence[str], threads: int) -> AttentionRates:
    """`measure` in a process of its own; empty, and logged, where that fails: figures are derived then."""
    try:
        return measured_apart(AttentionRates, __name__, list(types), threads, limit_s=_LIMIT_S)
    except FAILURES as error:
        log.warning("attention over %s could not be measured: %s", ", ".join(types), error)
        return AttentionRates()


def measure(types: Iterable[str], threads: int) -> AttentionRates:
    """Of each type, on one thread and on `threads`; a second a type, compiling not counted."""
    return AttentionRates({name: _points(KVType(name), sorted({1, threads})) for name in types})


def _points(kind: KVType, counts: Iterable[int]) -> tuple[AttentionPoint, ...]:
    """Of one token over memory that no cache holds, and of tokens of a prompt over a short context."""
    from cpu_kernels.attention import Attention, partial_floats  # noqa: PLC0415 - compiler
    from cpu_kernels.kv_layout import KVLayout, KVMemory  # noqa: PLC0415
    from cpu_kernels.matrix import Matrix  # noqa: PLC0415
    from cpu_kernels.pool import Pool  # noqa: PLC0415
    from cpu_kernels.program import Program  # noqa: PLC0415

    layout = KVLayout(KV_HEADS, LENGTH, LENGTH, DEPTH_TOKENS, kind, kind)
    caches = -(-RAM_BYTES // (layout.pieces * layout.chunk_bytes))
    memory = np.full(caches * layout.pieces * layout.chunk_bytes + layout.window_bytes + PAGE_BYTES, _SAMPLE_BYTE, "u1")
    begin = -(-memory.ctypes.data // PAGE_BYTES) * PAGE_BYTES
    tables = begin + np.arange(caches * layout.pieces).reshape(caches, -1) * layout.chunk_bytes
    places = [KVMemory(layout, int(row.ctypes.data), int(tables[-1, -1]) + layout.chunk_bytes) for row in tables]
    heads = GROUP * KV_HEADS
    rows = np.full((2, PROMPT_TOKENS, heads * LENGTH), 1 / LENGTH, np.float32)
    queries, out = (Matrix.of(each) for each in rows)
    scratch = np.empty(partial_floats(heads, layout, 1), np.float32)
    scale = LENGTH**-0.5
    decode = Program(
        [
            row
            for place in places
            for row in Attention(*(out, queries, place), tokens=1, start=DEPTH_TOKENS - 1, scale=scale).split_rows(
                int(scratch.ctypes.data), layout.pieces
            )
        ]
    )
    prefill = Program(
        [Attention(out, queries, places[0], tokens=PROMPT_TOKENS, start=PROMPT_DEPTH_TOKENS, scale=scale).row()]
    )
    macs = 2 * LENGTH * heads * PROMPT_TOKENS * (PROMPT_DEPTH_TOKENS + PROMPT_TOKENS / 2)
    points = []
    for threads in counts:
        with Pool(threads) as pool:
            read_s, prompt_s = (_best_seconds(partial(pool.run, program)) for program in (decode, prefill))
        read_bytes = caches * DEPTH_TOKENS * layout.token_bytes
        points.append(AttentionPoint(threads, read_bytes / read_s, macs / prompt_s))
    return tuple(points)


def _best_seconds(work: Callable[[], object]) -> float:
    """The shortest of three runs or more: other programs only ever slow down."""
    work()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < _LEAST_RUNS or spent < _SECONDS_A_POINT:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best
