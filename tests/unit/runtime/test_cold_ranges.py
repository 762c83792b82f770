"""Attention to chunks from flash, range by range: the same bits with a ring of any size, for all kinds of passes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels import compiler
from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload import kv_chunks
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV, kv_cold
from runtime.executor.program.kv_tiers import KVTiers
from tests.support import models, programs
from tests.support.spilled import IDS, PIECES, TOKENS, plain_logits, run, spilling, taken_bytes

START = TOKENS - 64
SLOT_BYTES = 1 << 20
POLICIES = [KVPolicy(), KVPolicy(KVType.KIVI4, KVType.Q8_0), KVPolicy(budget_tokens=512)]
RINGS = st.tuples(st.integers(1, 16), st.integers(1, 4))
Logits = NDArray[np.float32]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = replace(models.spec_of(request.param), blocks=4)
    return models.write_model(tmp_path_factory.mktemp("model") / "model.gguf", spec, "Q8_0")


@pytest.fixture(scope="module")
def executor(path: Path) -> Iterator[ProgramExecutor]:
    tiers = KVTiers(ChunkStore(SpillFile(path.parent, SLOT_BYTES, in_parts=True)))
    with programs.executor(path, kv_tiers=tiers, threads=2) as made:
        yield made


def placements(layers: int) -> st.SearchStrategy[set[tuple[int, int]]]:
    return st.sets(st.tuples(st.integers(0, layers - 1), st.integers(0, PIECES - 2)))


def ring_of(monkeypatch: pytest.MonkeyPatch, slots: int, ranges: int) -> None:
    monkeypatch.setattr(kv_chunks, "RING_BYTES", 0)
    monkeypatch.setattr(kv_chunks, "RING_SLOTS", slots)
    monkeypatch.setattr(kv_cold, "RANGES", ranges)


def evict(executor: ProgramExecutor, kv: ProgramKV, cold: set[tuple[int, int]]) -> None:
    for layer, piece in cold:
        kv.save(piece)
        executor.kv_tiers.store.evict(kv.chunks(layer)[piece])


def bring(executor: ProgramExecutor, kv: ProgramKV, cold: set[tuple[int, int]]) -> None:
    for layer, piece in cold:
        assert kv.chunks(layer)[piece].memory is None, "reading does not bring it to RAM"
        executor.kv_tiers.store.bring(kv.chunks(layer)[piece])


def all_passes(executor: ProgramExecutor, kv: ProgramKV) -> list[Logits]:
    """Behind a token, a few, a tree, and a prompt of more tokens than a tile holds."""
    rows = []
    for step, logits in (
        (Step([IDS[START]], kv), "last"),
        (Step(IDS[START : START + 3], kv), "all"),
        (Step(IDS[START : START + 5], kv, parents=[-1, 0, 1, 0, -1]), "all"),
        (Step(IDS[START : START + 40], kv), "last"),
    ):
        kv.truncate(START)
        rows += executor.forward([step], logits=logits)
    kv.truncate(START)
    return rows


@pytest.mark.parametrize("policy", POLICIES, ids=["f16", "coded", "chosen"])
def test_a_ring_of_any_size_gives_the_same_bits(executor: ProgramExecutor, policy: KVPolicy) -> None:
    kv = executor.new_kv(TOKENS + 64, policy)
    executor.forward([Step(IDS[:START], kv)])
    expected = all_passes(executor, kv)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(placements(len(kv.layout.layers)), RINGS)
    def check(cold: set[tuple[int, int]], ring: tuple[int, int]) -> None:
        evict(executor, kv, cold)
        with pytest.MonkeyPatch.context() as patch:
            ring_of(patch, *ring)
            for found, wanted in zip(all_passes(executor, kv), expected, strict=True):
                assert np.array_equal(found, wanted)
        bring(executor, kv, cold)

    check()


def test_lanes_that_share_chunks_and_lanes_that_do_not(executor: ProgramExecutor) -> None:
    kv, other = (executor.new_kv(TOKENS + 64) for _ in range(2))
    executor.forward([Step(IDS[:START], kv)])
    executor.forward([Step(IDS[64:START], other)])
    fork = executor.new_kv(TOKENS + 64)
    assert executor.share_kv(fork, kv, START - 700) == START - 700
    executor.forward([Step(IDS[: 700 - 64], fork)])
    caches = [fork, other, kv]

    def decoded() -> list[Logits]:
        rows = executor.forward([Step([IDS[START]], cache) for cache in caches])
        for cache in caches:
            cache.truncate(cache.length - 1)
        return rows

    expected = decoded()

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(*[placements(executor.model.block_count)] * 2, RINGS)
    def check(shared: set[tuple[int, int]], cold: set[tuple[int, int]], ring: tuple[int, int]) -> None:
        evict(executor, kv, shared)
        evict(executor, other, cold)
        with pytest.MonkeyPatch.context() as patch:
            ring_of(patch, *ring)
            assert np.array_equal(decoded(), expected)
        bring(executor, kv, shared)
        bring(executor, other, cold)

    check()


@pytest.mark.parametrize("ring", [(1, 4), (3, 2), (8, 4)])
def test_a_prompt_spills_to_a_small_ring(path: Path, ring: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain_logits(path, TOKENS, 3)
    ring_of(monkeypatch, *ring)
    with spilling(path, 2) as executor:
        kv = executor.new_kv(TOKENS + 64)
        assert np.array_equal(run(executor, kv, IDS[:TOKENS]), expected[0])
        assert executor.kv_tiers.cold_pieces >= 2
        assert executor.kv_tiers.staging_slots <= ring[0]
        for index in range(3):
            assert np.array_equal(run(executor, kv, IDS[TOKENS + index : TOKENS + index + 1]), expected[1 + index])
            assert taken_bytes(executor, kv) <= (executor.kv_tiers.most_bytes or 0)


def test_no_kernel_is_loaded_when_memory_is_scarce(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, loaded = compiler._load, []

    def recorded(name: str, code: bytes) -> int:
        loaded.append(name)
        return load(name, code)

    monkeypatch.setattr(compiler, "_addresses", {})
    monkeypatch.setattr(compiler, "_load", recorded)
    with spilling(path, 2) as executor:
        executor.warm_up()
        known = len(loaded)
        assert any("attention_range" in name for name in loaded)
        kv = executor.new_kv(TOKENS + 64)
        run(executor, kv, IDS[:TOKENS])
        assert executor.kv_tiers.cold_pieces
        assert not loaded[known:]
