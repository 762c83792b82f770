"""What tokens choose of chunks on flash is the same whatever RAM keeps of it, and that stays within its limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload import pair_cache
from offload.kv_chunks import KEPT_PIECES, ChunkStore, cached_chunks
from offload.kv_spill import SpillFile
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV
from runtime.executor.program.kv_chosen import runs_of
from runtime.executor.program.kv_tiers import KVTiers, index_bytes
from tests.support import models, programs

TOKENS = 5200
IDS = models.prompt(length=TOKENS + 64)
MORE = 6
TYPES = [(KVType.F16, KVType.F16, 0.85), (KVType.KIVI4, KVType.Q8_0, 0.95)]  # and how much of them is in RAM


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = replace(models.spec_of("llama"), blocks=8)
    return models.write_model(tmp_path_factory.mktemp("model") / "model.gguf", spec, "Q8_0")


@contextmanager
def limited(path: Path, policy: KVPolicy, most_bytes: int | None) -> Iterator[ProgramExecutor]:
    tiers = KVTiers(ChunkStore(SpillFile(path.parent, 1 << 18, in_parts=True)), most_bytes)
    with programs.executor(path, threads=2, kv_policy=policy, kv_tiers=tiers) as executor:
        yield executor


def filled(executor: ProgramExecutor) -> ProgramKV:
    kv = executor.new_kv(TOKENS + 64)
    executor.forward([Step(IDS[:TOKENS], kv)], logits="none")
    return kv


def decoded(executor: ProgramExecutor, kv: ProgramKV) -> list[np.ndarray]:
    kv.truncate(kv.cut_at(TOKENS))
    if kv.length < TOKENS:
        executor.forward([Step(IDS[kv.length : TOKENS], kv)], logits="none")
    return [executor.forward([Step([IDS[kv.length]], kv)])[0] for _ in range(MORE)]


@pytest.mark.parametrize(("key", "value", "share"), TYPES)
def test_what_is_kept_in_ram_changes_no_bit(path: Path, key: KVType, value: KVType, share: float) -> None:
    policy = KVPolicy(key, value, budget_tokens=512)
    with limited(path, policy, None) as executor:
        kv = filled(executor)
        expected = decoded(executor, kv)
        most_bytes = int(share * kv.pieces * kv.layout.piece_bytes)
    with limited(path, policy, most_bytes) as executor:
        tiers, kv = executor.kv_tiers, filled(executor)
        spill = tiers.store.spill
        assert spill is not None
        assert spill.pairs is not None
        read = []
        for _ in range(2):
            before = spill.pairs.num_bytes
            for logits, wanted in zip(decoded(executor, kv), expected, strict=True):
                assert np.array_equal(logits, wanted)
            read.append(spill.pairs.num_bytes - before)
        assert tiers.taken_bytes <= most_bytes + index_bytes(kv.layout, 1)  # of the next piece
        assert tiers.cold_pieces > 0
        cache = executor._runner._cold.chosen.cache
        assert cache is not None
        assert cache.num_bytes <= tiers.cache_bytes
        assert cache.hits > 0
        assert read[0] > 0
        assert read[1] < read[0], "what was chosen before is in RAM"


def test_sequences_share_the_limit_and_the_cache(path: Path) -> None:
    policy = KVPolicy(budget_tokens=512)
    with limited(path, policy, None) as executor:
        kv = filled(executor)
        expected = decoded(executor, kv)
        most_bytes = int(1.6 * kv.pieces * kv.layout.piece_bytes)
    with limited(path, policy, most_bytes) as executor:
        caches = [filled(executor) for _ in range(2)]
        for index in range(MORE):
            for logits in executor.forward([Step([IDS[TOKENS + index]], kv) for kv in caches]):
                assert np.array_equal(logits, expected[index])
        index = index_bytes(caches[0].layout, 2)  # of the next pieces
        assert executor.kv_tiers.taken_bytes <= most_bytes + index
        assert executor.kv_tiers.cold_pieces > 0
        del caches, kv, logits
        again = filled(executor)
        for logits, wanted in zip(decoded(executor, again), expected, strict=True):
            assert np.array_equal(logits, wanted)


def test_without_memory_for_a_cache_all_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("7 bytes")

    policy = KVPolicy(budget_tokens=512)
    with limited(path, policy, None) as executor:
        kv = filled(executor)
        expected = decoded(executor, kv)
    monkeypatch.setattr(pair_cache, "reserved_bytes", no_memory)
    with limited(path, policy, 1 << 30) as executor:
        kv = filled(executor)
        for piece in range(6):
            kv.evict(piece, range(2, 8))
        for logits, wanted in zip(decoded(executor, kv), expected, strict=True):
            assert np.array_equal(logits, wanted)
    assert "no memory (7 bytes)" in caplog.text


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.randoms())
def test_runs_are_what_lies_side_by_side(rows: int, columns: int, longest: int, random) -> None:
    wanted = np.array([[random.random() < 0.6 for _ in range(columns)] for _ in range(rows)])
    seen = np.zeros_like(wanted)
    for row, first, count in runs_of(wanted, longest):
        assert first // longest == (first + count - 1) // longest
        assert not seen[row, first : first + count].any()
        seen[row, first : first + count] = True
        before, behind = first - 1, first + count
        assert before < 0 or first % longest == 0 or not wanted[row, before]
        assert behind >= columns or behind % longest == 0 or not wanted[row, behind]
    assert np.array_equal(seen, wanted)


def test_more_on_flash_never_takes_more_ram() -> None:
    for pieces in range(1, 200):
        taken = [warm + cached_chunks(pieces - warm, warm) for warm in range(pieces + 1)]
        assert max(taken[: KEPT_PIECES + 1]) <= KEPT_PIECES
        assert taken[-1] == pieces
