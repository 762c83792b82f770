"""Rows 11, 14, 19 where tokens choose what they read: what is not as it was is never used, nor kept in RAM."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpu_kernels.kv_policy import KVPolicy
from offload import gguf_source
from offload.errors import SequenceError
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from runtime.executor.program import ProgramExecutor, ProgramKV, kv_chosen
from runtime.executor.program.kv_tiers import KVTiers
from tests.faults.test_row_11_spilled_kv import flip
from tests.support import models, programs
from tests.support.failing_reads import FailingReads
from tests.support.spilled import run

TOKENS = 2600
IDS = models.prompt(length=TOKENS + 64)
POLICY = KVPolicy(budget_tokens=512)
MORE = 4
SLOT_BYTES = 1 << 18

pytestmark = pytest.mark.usefixtures("no_read_pauses")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = replace(models.spec_of("llama"), blocks=4)
    return models.write_model(tmp_path_factory.mktemp("model") / "model.gguf", spec, "Q8_0")


@pytest.fixture(scope="module")
def expected(path: Path) -> list[np.ndarray]:
    with programs.executor(path, kv_policy=POLICY) as executor:
        kv = executor.new_kv(TOKENS + 64)
        return [run(executor, kv, IDS[:TOKENS]), *next_logits(executor, kv)]


def next_logits(executor: ProgramExecutor, kv: ProgramKV) -> list[np.ndarray]:
    return [run(executor, kv, IDS[TOKENS + index : TOKENS + index + 1]) for index in range(MORE)]


@contextmanager
def filled(path: Path) -> Iterator[tuple[ProgramExecutor, ProgramKV, SpillFile]]:
    """A sequence of which three of five pieces of the layers that are chosen from lie on flash."""
    spill = SpillFile(path.parent, SLOT_BYTES, in_parts=True)
    tiers = KVTiers(ChunkStore(spill), 1 << 30)
    with programs.executor(path, kv_policy=POLICY, kv_tiers=tiers) as executor:
        kv = executor.new_kv(TOKENS + 64)
        run(executor, kv, IDS[:TOKENS])
        for piece in range(3):
            kv.evict(piece, (2, 3))
        yield executor, kv, spill


def again_from(executor: ProgramExecutor, kv: ProgramKV, error: SequenceError, expected: list[np.ndarray]) -> None:
    assert error.kv is kv
    kv.truncate(error.kept_tokens)
    assert np.array_equal(run(executor, kv, IDS[error.kept_tokens : TOKENS]), expected[0])
    for logits, wanted in zip(next_logits(executor, kv), expected[1:], strict=True):
        assert np.array_equal(logits, wanted)


def test_row_14_a_flipped_bit_of_what_is_chosen_is_never_used(path: Path, expected: list[np.ndarray]) -> None:
    with filled(path) as (executor, kv, spill):
        slot = kv.chunks(3)[0].slot
        assert slot is not None
        flip(spill, slot.number * SLOT_BYTES + 777)  # of the first block, which is always read
        with pytest.raises(SequenceError, match="are not what was written") as raised:
            next_logits(executor, kv)
        assert raised.value.kept_tokens == 0
        again_from(executor, kv, raised.value, expected)


def test_row_11_what_is_chosen_is_read_again(
    path: Path, expected: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(path) as (executor, kv, _):
        reads = FailingReads(2, 1)
        monkeypatch.setattr(gguf_source, "positional_read", reads)
        for logits, wanted in zip(next_logits(executor, kv), expected[1:], strict=True):
            assert np.array_equal(logits, wanted)
        assert reads.calls > 2


@pytest.mark.parametrize("first", [1, 9])
def test_row_11_what_is_chosen_and_cannot_be_read_is_computed_again(
    path: Path, expected: list[np.ndarray], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(path) as (executor, kv, _):
        with monkeypatch.context() as patch:
            patch.setattr(gguf_source, "positional_read", FailingReads(first, 10**6))
            with pytest.raises(SequenceError, match=r"were lost: .*injected") as raised:
                next_logits(executor, kv)
        again_from(executor, kv, raised.value, expected)


@pytest.mark.parametrize("when", [1, 2, 5])
def test_row_19_an_interrupted_choice_changes_nothing(
    path: Path, expected: list[np.ndarray], when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, copy = [0], kv_chosen._copy

    def interrupted(*arguments: Any) -> None:
        copied[0] += 1
        if copied[0] == when:
            raise KeyboardInterrupt
        copy(*arguments)

    with filled(path) as (executor, kv, _):
        monkeypatch.setattr(kv_chosen, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next_logits(executor, kv)
        kv.truncate(TOKENS)
        for logits, wanted in zip(next_logits(executor, kv), expected[1:], strict=True):
            assert np.array_equal(logits, wanted)
