"""Row 11: reads of experts that are brought to the GPU fail. The step is refused, the next one works."""

import logging
from pathlib import Path

import numpy as np
import pytest

from runtime.executor import Step
from runtime.executor.hybrid import HybridPlacement
from tests.support import models, programs
from tests.support.divergence import kl_divergences
from tests.support.failing_reads import FailingReads
from tests.support.hybrid import BRINGING, hybrid, logits_after_failed_reads

IDS = models.prompt(length=40)
BOTH = frozenset({0, 1})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "model.gguf", models.spec_of("mixtral"), "F32")


def test_a_brought_expert_that_cannot_be_read(path: Path) -> None:
    expected = programs.logits_of(path, IDS)
    placement = HybridPlacement(BOTH, BOTH, output=True, expert_slots=0, brought_slots=6)
    with hybrid(path, placement, rates=BRINGING, threads=2) as runner:
        ours = logits_after_failed_reads(runner, IDS)
    assert kl_divergences(expected, ours).max() < 2e-6


def test_a_fetch_for_later_that_cannot_be_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody needs it: the CPU has the expert."""
    expected = programs.logits_of(path, IDS)
    with hybrid(path, HybridPlacement(BOTH, BOTH, output=True, expert_slots=4), threads=2) as runner:
        monkeypatch.setattr("offload.gguf_source.positional_read", FailingReads(1, 10**6))
        kv = runner.new_kv(64)
        with caplog.at_level(logging.WARNING):
            ours = np.concatenate([runner.forward([Step([token], kv)])[0] for token in IDS])
    assert any("could not be brought" in record.message for record in caplog.records)
    assert kl_divergences(expected, ours).max() < 2e-6
