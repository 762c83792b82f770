"""On a GPU a token's logits are the same to the bit whatever tokens are computed beside it: in chunks and in drafts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.engine import Engine
from runtime.executor import Step
from runtime.executor.base import Executor
from runtime.executor.hybrid import HybridPlacement
from runtime.generation import Generation
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.session import Session
from runtime.speculative.account import Account
from runtime.speculative.choosers import Chooser
from runtime.speculative.options import DraftOptions
from runtime.speculative.sequence import Passed, SpeculativeSequence
from runtime.speculative.totals import Totals
from tests.support import models
from tests.support.drafting import AnyLetterTokenizer, PatternDraft, policy
from tests.support.hybrid import hybrid, model_of

IDS = models.prompt(length=45)
BOTH = frozenset({0, 1})
CASES = [
    *(("llama", "F32"), ("llama", "Q4_K"), ("qwen3", "Q8_0"), ("gemma3", "F16"), ("bitnet", "TQ2_0")),
    *(("mixtral", "Q4_K"), ("qwen2moe", "F32")),
]


def path_of(folder: Path, name: str, quant_type: str) -> Path:
    return models.write_model(folder / f"{name}.gguf", models.spec_of(name), quant_type)


def placements_of(path: Path) -> list[HybridPlacement]:
    """All on the GPU; then parts of it, with all experts of a layer there or none."""
    model = model_of(path)
    routed = frozenset(layer.index for layer in model.layers if layer.ffn_gate_inp is not None)

    def placed(attention: frozenset[int], feed_forward: frozenset[int], *, output: bool) -> HybridPlacement:
        resident = routed & feed_forward
        slots = len(resident) * (0 if model.experts is None else model.experts.count)
        return HybridPlacement(attention, feed_forward, output=output, resident=resident, expert_slots=slots)

    layers = frozenset(range(model.block_count))
    return [
        placed(layers, layers, output=True),
        placed(frozenset({0}), frozenset({1}), output=True),
        placed(layers - {0}, layers, output=False),
    ]


def chunked(runner: Executor, ids: Sequence[int], sizes: Sequence[int]) -> NDArray[np.float32]:
    """All logits of a prompt in chunks of these sizes, the last one repeated."""
    kv, parts, first = runner.new_kv(128), [], 0
    for size in [*sizes, *[sizes[-1]] * len(ids)]:
        if first < len(ids):
            parts.append(runner.forward([Step(ids[first : first + size], kv)], logits="all")[0])
            first += size
    return np.concatenate(parts)


def assert_same_bits(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize(("name", "quant_type"), CASES)
def test_prompts_in_chunks_of_any_size(name: str, quant_type: str, tmp_path: Path) -> None:
    path = path_of(tmp_path, name, quant_type)
    for placement in placements_of(path):
        with hybrid(path, placement) as runner:
            wanted = chunked(runner, IDS, [1])
            for sizes in ([45], [17], [2, 31, 5], [33, 1]):
                assert_same_bits(chunked(runner, IDS, sizes), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_sequences_beside_each_other(name: str, tmp_path: Path) -> None:
    path = path_of(tmp_path, name, "Q8_0")
    for placement in placements_of(path):
        with hybrid(path, placement, context_tokens=512) as runner:
            alone = [chunked(runner, IDS[start:], [len(IDS), 1])[-1] for start in range(5)]
            caches = [runner.new_kv(128) for _ in alone]
            for start, kv in enumerate(caches):
                runner.forward([Step(IDS[start:-1], kv)])
            together = runner.forward([Step(IDS[-1:], kv) for kv in caches])
            for row, wanted in zip(together, alone, strict=True):
                assert_same_bits(row[-1], wanted)


def decoded(runner: Executor, draft: PatternDraft | None) -> tuple[list[int], NDArray[np.float32]]:
    """24 tokens behind a prompt, with or without drafts, and the logits that each was drawn from."""
    state = Generation(
        AnyLetterTokenizer(), Session(runner.new_kv(100)), IDS, sampling=SamplingParams(seed=1), max_tokens=24
    )
    rows: list[NDArray[np.float32]] = []

    def advance(row: NDArray[np.float32]) -> None:
        rows.append(np.array(row))
        state.advance(row)

    advance(runner.forward([state.next_step(100)])[0][-1])
    sequence = None
    if draft is not None:
        sequence = SpeculativeSequence(runner, draft, Chooser(state.sampler), Account())
    while not state.finished:
        if sequence is None:
            advance(runner.forward([state.next_step(1)])[0][-1])
            continue
        passed = sequence.next(state, policy(most=8), Totals("pattern"))
        assert isinstance(passed, Passed)
        advance(passed.row)
    if sequence is not None:
        sequence.end(state, policy(most=8), Totals("pattern"))
    return state.session.token_ids, np.stack(rows)


@pytest.mark.parametrize(("name", "quant_type"), [("llama", "Q4_K"), ("gemma3", "F16"), ("mixtral", "F32")])
def test_drafts_of_any_depth(name: str, quant_type: str, tmp_path: Path) -> None:
    path = path_of(tmp_path, name, quant_type)
    pattern = np.random.default_rng(3).integers(0, 4, 17) > 0
    for placement in placements_of(path)[:2]:
        with hybrid(path, placement, context_tokens=128) as runner:
            tokens, rows = decoded(runner, None)
            for depth in range(1, 9):
                found, drafted_rows = decoded(runner, PatternDraft(tokens, pattern.tolist(), [depth, depth, 1]))
                assert found == tokens
                assert_same_bits(drafted_rows, rows)


def test_answers_of_an_engine_with_drafts(caplog: pytest.LogCaptureFixture) -> None:
    """The demo wholly on a simulated GPU: nothing is said of answers that may differ."""
    options = {"threads": 1, "context_tokens": 128, "gpu": "sim:vram=1GiB,bw=500GB/s,link=20GB/s,tflops=20"}
    samplings = SamplingParams(temperature=0), SamplingParams(seed=5)
    found = []
    for draft in (DraftOptions("off"), DraftOptions("ngram", most=8, forced=True)):
        with Engine(DEMO_MODEL, loop="hybrid", draft=draft, **options) as engine:
            found.append(
                [
                    [piece.token_id for piece in engine.generate("She saw the cat. She saw", max_tokens=16, sampling=s)]
                    for s in samplings
                ]
            )
    assert found[0] == found[1]
    assert "may change the answer" not in caplog.text
