"""Keys and values over RAM and flash: logits do not depend on where chunks lie, and RAM stays within its limit."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV
from runtime.executor.program.kv_tiers import KVTiers
from tests.support import models, programs
from tests.support.spilled import assert_grow_together, plain_logits, run, spilling

TOKENS = 1500  # three pieces
IDS = models.prompt(length=TOKENS + 8)
SLOT_BYTES = 1 << 20


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return models.write_model(folder / "model.gguf", models.spec_of(request.param), "Q8_0")


@pytest.fixture(scope="module")
def executor(path: Path) -> Iterator[ProgramExecutor]:
    with programs.executor(path, kv_tiers=KVTiers(ChunkStore(SpillFile(path.parent, SLOT_BYTES)))) as made:
        yield made


@pytest.fixture(scope="module")
def store(executor: ProgramExecutor) -> ChunkStore:
    return executor.kv_tiers.store


def filled(executor: ProgramExecutor, tokens: int = TOKENS, policy: KVPolicy | None = None) -> ProgramKV:
    kv = executor.new_kv(TOKENS + 64, policy)
    executor.forward([Step(IDS[:tokens], kv)])
    return kv


def decoded(executor: ProgramExecutor, kv: ProgramKV, start: int, count: int) -> NDArray[np.float32]:
    """Logits of tokens one by one, then of two at once."""
    kv.truncate(start)
    rows = [executor.forward([Step([IDS[kv.length]], kv)])[0] for _ in range(count)]
    return np.concatenate([*rows, *executor.forward([Step(IDS[kv.length : kv.length + 40], kv)], logits="all")])


@pytest.mark.parametrize("kinds", [(KVType.F16, KVType.F16), (KVType.KIVI4, KVType.Q8_0)])
def test_any_chunks_may_lie_on_flash(
    executor: ProgramExecutor, store: ChunkStore, kinds: tuple[KVType, KVType]
) -> None:
    kv = filled(executor, policy=KVPolicy(*kinds))
    start = 1472  # where every type can be cut
    kept = [executor.new_kv(TOKENS + 64, KVPolicy(*kinds)) for _ in range(1)]
    executor.forward([Step(IDS[:start], kept[0])])
    expected = decoded(executor, kept[0], start, 2)
    layers = len(kv.layout.layers)
    kv.truncate(start)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.sets(st.tuples(st.integers(0, layers - 1), st.integers(0, 1))))
    def check(cold: set[tuple[int, int]]) -> None:
        for layer, piece in cold:
            kv.save(piece)
            store.evict(kv.chunks(layer)[piece])
        kv.truncate(start)
        assert np.array_equal(decoded(executor, kv, start, 2), expected)
        for layer, piece in cold:
            assert kv.chunks(layer)[piece].memory is None, "reading does not bring it to RAM"
            store.bring(kv.chunks(layer)[piece])

    check()


def test_a_prompt_reads_every_chunk_once_a_pass(path: Path) -> None:
    with spilling(path, 3) as executor:
        kv = executor.new_kv(TOKENS + 64)
        run(executor, kv, IDS[:TOKENS])
        spill, cold = executor.kv_tiers.store.spill, executor.kv_tiers.cold_pieces
        assert spill is not None
        windows = [layer.sliding_window for layer in executor.model.layers]
        for tokens in (1, 40):
            before, start = spill.read_bytes, kv.length
            run(executor, kv, IDS[start : start + tokens])
            seen = [cold - min(cold, 0 if window is None else (start - window + 1) // 512) for window in windows]
            expected = sum(count * kept.chunk_bytes for count, kept in zip(seen, kv.layout.layers, strict=True))
            assert spill.read_bytes - before == expected


def test_sequences_move_to_flash_as_they_grow_and_logits_are_the_same(path: Path) -> None:
    expected = plain_logits(path, TOKENS, 2)
    with spilling(path, 3) as executor:
        caches = assert_grow_together(executor, TOKENS, expected)
        assert all(any(chunk.memory is None for chunk in kv.chunks(0)) for kv in caches)
