"""Perplexity of a text under a model, by the protocol of llama.cpp's `llama-perplexity`.

The ids of the whole text are cut into chunks of the context's length, the rest is left out; each chunk starts from an
empty cache, its first token replaced by BOS where the vocabulary adds one. Only the second half is scored, so that
every scored token has at least half a context before it: of n tokens those with index n // 2 + 1 to n - 1.

Knows nothing about tokenizers and engines: it is handed ids and a function that gives logits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.errors import ModelFormatError, RequestError

MIN_CONTEXT_TOKENS = 4
_ROWS_AT_ONCE = 64  # bounds the temporaries to 64 rows of the vocabulary


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A result: `value` = exp(`nll`), its standard error, and how much text it comes from.

    `nll` is the mean negative log-likelihood in nats a token, `tokens` the number of tokens scored.
    """

    value: float
    standard_error: float
    nll: float
    tokens: int
    chunks: int


def perplexity(
    logits_of: Callable[[Sequence[int]], NDArray[np.float32]],
    ids: Sequence[int],
    *,
    context_tokens: int,
    bos_id: int | None,
    max_chunks: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Score `ids`, the whole text encoded with the vocabulary's special tokens.

    `logits_of` maps n token ids to (n, vocabulary) logits from an empty cache. `bos_id` is the BOS token where the
    vocabulary adds one, else None. `progress` gets chunks done, chunks in all, and the value so far. The standard error
    is that of the mean, scaled by the value: `value * sqrt((E[x^2] - E[x]^2) / (tokens - 1))` over x = -log p.

    Raises `RequestError` for a context or text too short, `ModelFormatError` on logits that are not finite.
    """
    if context_tokens < MIN_CONTEXT_TOKENS:
        raise RequestError(f"perplexity needs a context of at least {MIN_CONTEXT_TOKENS} tokens, not {context_tokens}")
    if max_chunks is not None and max_chunks < 1:
        raise RequestError(f"the number of chunks must be at least 1, not {max_chunks}")
    if len(ids) < 2 * context_tokens:
        raise RequestError(
            f"perplexity at a context of {context_tokens} needs at least {2 * context_tokens} tokens of text; "
            f"this one has {len(ids)}",
            hint="use a longer text or a smaller -c",
        )
    chunks = min(len(ids) // context_tokens, max_chunks or len(ids))
    total, total_squares, tokens = 0.0, 0.0, 0
    for chunk in range(chunks):
        chunk_ids = list(ids[chunk * context_tokens : (chunk + 1) * context_tokens])
        if bos_id is not None:
            chunk_ids[0] = bos_id
        losses = _chunk_losses(logits_of(chunk_ids), chunk_ids, chunk)
        total += float(losses.sum())
        total_squares += float((losses * losses).sum())
        tokens += len(losses)
        if progress is not None:
            progress(chunk + 1, chunks, _exponential(total / tokens))
    nll = total / tokens
    variance = max(0.0, total_squares / tokens - nll * nll)
    value = _exponential(nll)
    return Perplexity(value, value * math.sqrt(variance / max(1, tokens - 1)), nll, tokens, chunks)


def _chunk_losses(logits: NDArray[np.float32], chunk_ids: Sequence[int], chunk: int) -> NDArray[np.float64]:
    """Negative log-likelihood of every scored token of one chunk."""
    first = len(chunk_ids) // 2
    targets = np.array(chunk_ids[first + 1 :], dtype=np.int64)
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, len(targets)))
        rows = logits[first + part.start : first + part.stop]  # the row at a token predicts the one after it
        peaks = rows.max(axis=1)
        if not np.isfinite(peaks).all():
            raise ModelFormatError(f"the logits of chunk {chunk + 1} are not finite: a weight or a kernel is broken")
        mass = np.exp(rows - peaks[:, None]).sum(axis=1, dtype=np.float64)
        chosen = rows[np.arange(len(rows)), targets[part]]
        losses[part] = np.log(mass) - (chosen.astype(np.float64) - peaks)
    return losses


def _exponential(nll: float) -> float:
    """exp(nll), infinity where a double cannot hold it."""
    return math.exp(nll) if nll < 709.0 else math.inf
