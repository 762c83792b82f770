"""What the KV cache's types cost in quality: perplexity, divergence and retrieval beside the same model's float16.

Every policy goes through the same tokens in step with float16: chunks of a text as for `runtime.perplexity`, the second
half of each scored; then a needle, which is a run of random tokens, somewhere in the text, whose beginning comes again
at the end: does the model go on with the rest? Knows nothing about tokenizers, planners and terminals.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_policy import F16_POLICY, KVPolicy
from offload.errors import ModelFormatError, RequestError
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV

MIN_CONTEXT_TOKENS = 64
ROWS_AT_ONCE = 64  # bounds what is held of logits
NEEDLE_TOKENS = 16
CUE_TOKENS = 4  # of a needle that are told again
NEEDLE_PLACES = (0.05, 0.25, 0.5, 0.75, 0.9)  # of the text before the cue

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PolicyScore:
    """How one policy does: `divergence` is the mean of KL(float16 || policy) in nats a token, `worst` its 99th
    percentile, `same_top` how often both would choose the same token, `retrieved` the share of needles' tokens that
    come first, `share` the cache's bytes beside those of float16.
    """

    policy: str
    share: float
    perplexity: float
    divergence: float
    worst: float
    same_top: float
    retrieved: float | None


@dataclass(slots=True)
class _Sums:
    """What is gathered of a policy."""

    loss: float = 0.0
    tokens: int = 0
    same: int = 0
    needles: int = 0
    found: int = 0


def evaluate(
    executor: ProgramExecutor,
    ids: Sequence[int],
    policies: Sequence[KVPolicy],
    *,
    context_tokens: int,
    bos_id: int | None,
    max_chunks: int | None = None,
    progress: Progress | None = None,
) -> list[PolicyScore]:
    """Scores of float16, then of `policies`, over the text's token `ids`.

    RequestError for a context or text too short, ModelFormatError on logits that are not finite.
    """
    if context_tokens < MIN_CONTEXT_TOKENS:
        raise RequestError(f"a context of {context_tokens} tokens; at least {MIN_CONTEXT_TOKENS} show something")
    chunks = min(len(ids) // context_tokens, max_chunks or len(ids))
    if chunks < 1:
        raise RequestError(f"{len(ids)} tokens of text do not fill a context of {context_tokens}")
    every = [F16_POLICY, *policies]
    sums = [_Sums() for _ in every]
    divergences: list[list[NDArray[np.float64]]] = [[] for _ in every]
    needles = [place for place in NEEDLE_PLACES if context_tokens >= 4 * NEEDLE_TOKENS]
    for chunk in range(chunks):
        tokens = list(ids[chunk * context_tokens : (chunk + 1) * context_tokens])
        if bos_id is not None:
            tokens[0] = bos_id
        _score_chunk([executor.new_kv(context_tokens, policy) for policy in every], executor, tokens, sums, divergences)
        place = needles[chunk % len(needles)]
        for each, policy in zip(sums, every, strict=True):
            _find_needle(executor, executor.new_kv(context_tokens, policy), tokens, place, chunk, each)
        if progress is not None:
            progress(chunk + 1, chunks)
    plain = executor.new_kv(context_tokens, F16_POLICY).num_bytes
    return [
        PolicyScore(
            policy=policy.name,
            share=executor.new_kv(context_tokens, policy).num_bytes / plain,
            perplexity=math.exp(min(total.loss / total.tokens, 700.0)),
            divergence=float(np.concatenate(parts).mean()),
            worst=float(np.quantile(np.concatenate(parts), 0.99)),
            same_top=total.same / total.tokens,
            retrieved=total.found / total.needles if total.needles else None,
        )
        for policy, total, parts in zip(every, sums, divergences, strict=True)
    ]


def _score_chunk(
    caches: Sequence[ProgramKV],
    executor: ProgramExecutor,
    tokens: list[int],
    sums: list[_Sums],
    divergences: list[list[NDArray[np.float64]]],
) -> None:
    """The second half of a chunk, a few tokens at a time; the first of the caches is what others are held against."""
    half = len(tokens) // 2
    for kv in caches:
        executor.forward([Step(tokens[:half], kv)], logits="none")
    for start in range(half, len(tokens) - 1, ROWS_AT_ONCE):
        part = tokens[start : min(start + ROWS_AT_ONCE, len(tokens) - 1)]
        targets = np.array(tokens[start + 1 : start + 1 + len(part)])
        expected: NDArray[np.float64] | None = None
        for kv, total, parts in zip(caches, sums, divergences, strict=True):
            found = _log_shares(executor.forward([Step(part, kv)], logits="all")[0])
            expected = found if expected is None else expected
            total.loss -= float(found[np.arange(len(part)), targets].sum())
            total.tokens += len(part)
            total.same += int((found.argmax(1) == expected.argmax(1)).sum())
            parts.append((np.exp(expected) * (expected - found)).sum(1))


def _find_needle(
    executor: ProgramExecutor, kv: ProgramKV, tokens: list[int], place: float, seed: int, total: _Sums
) -> None:
    """The rest of a needle behind its cue, each token told what came before it."""
    needle = [int(token) for token in np.random.default_rng(seed).choice(tokens, NEEDLE_TOKENS)]
    text = tokens[: len(tokens) - 2 * NEEDLE_TOKENS]
    at = max(int(place * len(text)), 1)
    executor.forward([Step([*text[:at], *needle, *text[at:], *needle[: CUE_TOKENS - 1]], kv)], logits="none")
    rows = executor.forward([Step(needle[CUE_TOKENS - 1 : -1], kv)], logits="all")[0]
    total.needles += len(rows)
    total.found += int((rows.argmax(1) == np.array(needle[CUE_TOKENS:])).sum())


def _log_shares(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the softmax of every row."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    if not np.isfinite(wide).all():
        raise ModelFormatError("logits are not finite: a weight or a kernel is broken")
    shares: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return shares
