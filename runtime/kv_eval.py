"""What the KV cache's types, and reading a part of it, cost in quality: perplexity, divergence and retrieval beside the
same model's float16.

Every policy goes through the same tokens in step with float16: chunks of a text as for `runtime.perplexity`, the second
half of each scored; then a needle, which is a run of random tokens, somewhere in the text, whose beginning comes again
at the end: does the model go on with the rest? Questions may be given in place of needles. Knows nothing about
tokenizers, planners and terminals.
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
from runtime.kv_questions import Question, found_tokens

MIN_CONTEXT_TOKENS = 64
ROWS_AT_ONCE = 64  # bounds what is held of logits
NEEDLE_TOKENS = 16
CUE_TOKENS = 4  # of a needle that are told again
NEEDLE_PLACES = (0.05, 0.25, 0.5, 0.75, 0.9)  # of the text before the cue

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PolicyScore:
    """How one policy does: `divergence` is the mean of KL(float16 || policy) in nats a token, `worst` its 99th
    percentile, `same_top` how often both would choose the same token, `retrieved` the share of needles' or answers'
    tokens that come first, `share` the cache's bytes beside those of float16, `read` the share of its blocks that are
    read under a budget, in layers that have one.
    """

    policy: str
    share: float
    perplexity: float
    divergence: float
    worst: float
    same_top: float
    retrieved: float | None
    read: float = 1.0


@dataclass(slots=True)
class _Sums:
    """What is gathered of a policy."""

    loss: float = 0.0
    tokens: int = 0
    same: int = 0
    needles: int = 0
    found: int = 0
    blocks: int = 0
    read_blocks: int = 0

    def count(self, kv: ProgramKV) -> None:
        """Adds what was read of a cache."""
        if kv.abstracts is not None:
            counts = kv.abstracts.counts
            self.blocks, self.read_blocks = self.blocks + counts.blocks, self.read_blocks + counts.read_blocks


def evaluate(
    executor: ProgramExecutor,
    ids: Sequence[int],
    policies: Sequence[KVPolicy],
    *,
    context_tokens: int,
    bos_id: int | None,
    max_chunks: int | None = None,
    questions: Sequence[Question] = (),
    progress: Progress | None = None,
) -> list[PolicyScore]:
    """Scores of float16, then of `policies`, over the text's token `ids`.

    `questions` take the place of needles. RequestError for a context or text too short, ModelFormatError on logits that
    are not finite.
    """
    if context_tokens < MIN_CONTEXT_TOKENS:
        raise RequestError(f"a context of {context_tokens} tokens; at least {MIN_CONTEXT_TOKENS} show something")
    chunks = min(len(ids) // context_tokens, max_chunks or len(ids))
    if chunks < 1:
        raise RequestError(
            f"{len(ids)} tokens of text do not fill a context of {context_tokens}",
            hint="use a longer text or a smaller -c",
        )
    every = [F16_POLICY, *policies]
    sums = [_Sums() for _ in every]
    divergences: list[list[NDArray[np.float64]]] = [[] for _ in every]
    for chunk in range(chunks):
        tokens = list(ids[chunk * context_tokens : (chunk + 1) * context_tokens])
        if bos_id is not None:
            tokens[0] = bos_id
        caches = [executor.new_kv(context_tokens, policy) for policy in every]
        _score_chunk(caches, executor, tokens, sums, divergences)
        for each, policy, kv in zip(sums, every, caches, strict=True):
            each.count(kv)
            if not questions:
                place = NEEDLE_PLACES[chunk % len(NEEDLE_PLACES)]
                _find_needle(executor, executor.new_kv(context_tokens, policy), tokens, place, chunk, each)
        if progress is not None:
            progress(chunk + 1, chunks + len(questions))
    for number, question in enumerate(questions, chunks + 1):
        for each, policy in zip(sums, every, strict=True):
            _ask(executor, executor.new_kv(question.num_tokens, policy), question, each)
        if progress is not None:
            progress(number, chunks + len(questions))
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
            read=total.read_blocks / total.blocks if total.blocks else 1.0,
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


def _ask(executor: ProgramExecutor, kv: ProgramKV, question: Question, total: _Sums) -> None:
    total.needles += len(question.answer)
    total.found += found_tokens(executor, kv, question)
    total.count(kv)


def _log_shares(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the softmax of every row."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    if not np.isfinite(wide).all():
        raise ModelFormatError("logits are not finite: a weight or a kernel is broken")
    shares: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return shares
