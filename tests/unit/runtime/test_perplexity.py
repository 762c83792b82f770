"""Perplexity against a plain double loop over the protocol."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from offload.errors import ModelFormatError, RequestError
from runtime.perplexity import perplexity

VOCABULARY = 11


def logits_of(ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits that depend on every token before: (tokens, vocabulary)."""
    sums = np.cumsum(np.asarray(ids) + 1)
    return np.sin(sums[:, None] * 0.7 + np.arange(VOCABULARY) * 1.3).astype(np.float32) * 4


def plain_losses(ids: list[int], context: int, bos: int | None, chunks: int) -> list[float]:
    losses: list[float] = []
    for chunk in range(chunks):
        tokens = ids[chunk * context : (chunk + 1) * context]
        if bos is not None:
            tokens[0] = bos
        rows = logits_of(tokens).astype(np.float64)
        losses += [math.log(np.exp(rows[i]).sum()) - rows[i][tokens[i + 1]] for i in range(context // 2, context - 1)]
    return losses


@pytest.mark.parametrize("context", [4, 7, 16, 160])
@pytest.mark.parametrize("bos", [None, 2])
@pytest.mark.parametrize("max_chunks", [None, 2, 1000])
def test_equals_the_plain_protocol(context: int, bos: int | None, max_chunks: int | None) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 3 * context + 3).tolist()
    seen: list[tuple[int, int, float]] = []
    result = perplexity(
        logits_of,
        ids,
        context_tokens=context,
        bos_id=bos,
        max_chunks=max_chunks,
        progress=lambda done, chunks, value: seen.append((done, chunks, value)),
    )
    chunks = min(3, max_chunks or 3)
    losses = plain_losses(ids, context, bos, chunks)
    assert (result.chunks, result.tokens) == (chunks, len(losses))
    assert result.nll == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    error = result.value * math.sqrt(np.var(losses) / (len(losses) - 1)) if len(losses) > 1 else 0.0
    assert result.standard_error == pytest.approx(error, rel=1e-4)
    assert [entry[:2] for entry in seen] == [(done + 1, chunks) for done in range(chunks)]
    assert seen[-1][2] == pytest.approx(result.value)


def test_a_certain_model_has_perplexity_one() -> None:
    def certain(ids: Sequence[int]) -> NDArray[np.float32]:
        rows = np.full((len(ids), VOCABULARY), -200.0, dtype=np.float32)
        rows[np.arange(len(ids) - 1), list(ids[1:])] = 0.0
        return rows

    result = perplexity(certain, [3] * 40, context_tokens=20, bos_id=None)
    assert (result.value, result.standard_error) == (1.0, 0.0)


def test_a_hopeless_model_is_infinitely_perplexed() -> None:
    def hopeless(ids: Sequence[int]) -> NDArray[np.float32]:
        rows = np.full((len(ids), VOCABULARY), -1000.0, dtype=np.float32)
        rows[:, 0] = 0.0
        return rows

    assert perplexity(hopeless, [3] * 40, context_tokens=20, bos_id=None).value == math.inf


def test_a_short_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"context of 20 needs at least 40 tokens of text; this one has 39"):
        perplexity(logits_of, [1] * 39, context_tokens=20, bos_id=None)


@pytest.mark.parametrize(("context", "max_chunks"), [(3, None), (0, None), (-5, None), (4, 0)])
def test_bounds(context: int, max_chunks: int | None) -> None:
    with pytest.raises(RequestError, match="at least"):
        perplexity(logits_of, [1] * 100, context_tokens=context, bos_id=None, max_chunks=max_chunks)


def test_broken_logits_are_refused() -> None:
    def broken(ids: Sequence[int]) -> NDArray[np.float32]:
        return np.full((len(ids), VOCABULARY), np.nan, dtype=np.float32)

    with pytest.raises(ModelFormatError, match="chunk 1"):
        perplexity(broken, [1] * 40, context_tokens=20, bos_id=None)
