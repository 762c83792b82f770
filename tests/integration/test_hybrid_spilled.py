"""Keys and values over a GPU, RAM and flash: logits do not depend on what of RAM's part lies on flash."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import SequenceError
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from runtime.executor import Step
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from runtime.executor.hybrid.kv import HybridKV
from runtime.executor.program.kv_tiers import KVTiers
from tests.support import models
from tests.support.hybrid import hybrid, model_of
from tests.support.spilled import (
    IDS,
    LOOPS,
    PIECES,
    SLOT_BYTES,
    TIGHT,
    TOKENS,
    agree,
    plain_logits,
    run,
    spilling,
    taken_bytes,
)

START = 1900  # in the fourth piece
CAPACITY = 2100
PLACEMENTS = {
    "all on the GPU": lambda layers: HybridPlacement(layers, layers, output=True),
    "one layer": lambda layers: HybridPlacement(frozenset({1}), layers, output=False),
    "no cache": lambda layers: HybridPlacement(layers, layers, output=True, ram_kv=layers),
    "one in RAM": lambda layers: HybridPlacement(layers, frozenset(), output=True, ram_kv=frozenset({1})),
}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention; and windows."""
    return models.write_model(tmp_path_factory.mktemp("model") / "m.gguf", models.spec_of(request.param), "Q8_0")


@pytest.fixture(scope="module", params=[*((name, KVType.F16) for name in PLACEMENTS), ("one layer", KVType.Q8_0)])
def executor(request: pytest.FixtureRequest, path: Path) -> Iterator[HybridExecutor]:
    name, kind = request.param
    placement = PLACEMENTS[name](frozenset(range(model_of(path).block_count)))
    options = {"kv_tiers": KVTiers(ChunkStore(SpillFile(path.parent, SLOT_BYTES))), "kv_policy": KVPolicy(kind, kind)}
    with hybrid(path, placement, chunk_tokens=256, context_tokens=CAPACITY, **options) as made:
        yield made


def filled(executor: HybridExecutor, moved: int) -> HybridKV:
    kv = executor.new_kv(CAPACITY)
    executor.forward([Step(IDS[:START], kv)], logits="none")
    for _ in range(min(moved, kv.movable_pieces)):
        kv.move_piece()
    return kv


def decoded(executor: HybridExecutor, kv: HybridKV) -> NDArray[np.float32]:
    """Logits of tokens one by one, then of some at once."""
    kv.truncate(START)
    rows = [run(executor, kv, [IDS[kv.length]]) for _ in range(2)]
    return np.concatenate([*rows, *executor.forward([Step(IDS[kv.length : kv.length + 40], kv)], logits="all")])


@pytest.mark.parametrize("moved", [1, 3])
def test_any_chunks_of_any_layers_may_lie_on_flash(executor: HybridExecutor, moved: int) -> None:
    store, layers = executor.kv_tiers.store, range(executor.model.block_count)
    kv = filled(executor, moved)
    expected = decoded(executor, kv)
    kv.truncate(START)

    @settings(max_examples=10, deadline=None, derandomize=True)  # for each of two models, five placements
    @given(st.sets(st.tuples(st.sampled_from(layers), st.integers(0, 2))))
    def check(cold: set[tuple[int, int]]) -> None:
        chosen = [(layer, piece) for layer, piece in cold if piece < kv.settled_pieces(layer)]
        for layer, piece in chosen:
            kv.evict(piece, [layer])
        assert np.array_equal(decoded(executor, kv), expected)
        for layer, piece in chosen:
            assert kv.chunks(layer)[piece].memory is None, "reading does not bring it to RAM"
            store.bring(kv.chunks(layer)[piece])

    check()


def test_layers_of_the_gpu_take_ram_for_what_has_moved_alone(path: Path) -> None:
    layers = frozenset(range(model_of(path).block_count))
    with hybrid(path, HybridPlacement(layers, layers, output=True), chunk_tokens=256) as executor:
        kv, store = filled(executor, 0), executor.kv_tiers.store
        assert store.ram_bytes == 0
        kv.move_piece()
        assert store.ram_bytes == kv.layout.piece_bytes
        kv.truncate(100)
        run(executor, kv, [1])
        assert store.ram_bytes == 0
        assert kv.ram_pieces == 0


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_what_ram_has_no_room_for_goes_to_flash(path: Path, pieces: int) -> None:
    """Hot on the GPU, warm in RAM, cold on flash: never more RAM than there may be, and the same logits to the bit."""
    expected = plain_logits(path, TOKENS, 3, TIGHT)
    with spilling(path, pieces, placement=TIGHT) as executor:
        most, kv = executor.kv_tiers.most_bytes, executor.new_kv(TOKENS + 64)
        assert isinstance(kv, HybridKV)
        found = [run(executor, kv, IDS[:TOKENS])]
        for index in range(3):
            found.append(run(executor, kv, [IDS[TOKENS + index]]))
            assert taken_bytes(executor, kv) <= most
        assert kv.ram_pieces >= PIECES - 2
        assert executor.kv_tiers.cold_pieces >= PIECES - pieces - 1
        for logits, wanted in zip(found, expected, strict=True):
            assert np.array_equal(logits, wanted)


@contextmanager
def spilled(path: Path) -> Iterator[tuple[HybridExecutor, HybridKV]]:
    """A sequence of `TOKENS` tokens in all three tiers, and one beside it."""
    with spilling(path, 1, placement=TIGHT) as executor:
        assert isinstance(executor, HybridExecutor)
        kv = executor.new_kv(TOKENS + 64)
        run(executor, kv, IDS[:TOKENS])
        yield executor, kv


def test_a_gpu_without_memory_moves_layers_on_to_flash(path: Path) -> None:
    """The last rung of the ladder; what was there stays there."""
    expected = plain_logits(path, TOKENS, 2, TIGHT)
    with spilled(path) as (executor, kv):
        run(executor, kv, [IDS[TOKENS]])
        executor._move_keys_and_values("as if")
        assert executor.placement.ram_kv == {1}
        assert taken_bytes(executor, kv) <= executor.kv_tiers.most_bytes
        assert executor.kv_tiers.cold_pieces >= 1
        assert agree(kv, run(executor, kv, [IDS[TOKENS + 1]]), expected[2])


def test_a_layer_that_finds_no_room_stays_on_the_gpu(path: Path) -> None:
    expected = plain_logits(path, TOKENS, 2, TIGHT)
    with spilled(path) as (executor, kv):
        before = executor.kv_tiers.most_bytes, executor.kv_tiers.store.ram_bytes
        executor.kv_tiers.most_bytes = 1000
        with pytest.raises(SequenceError, match="have no room in the 1000 bytes") as raised:
            executor._move_keys_and_values("as if")
        assert raised.value.kv is kv
        assert not executor.placement.ram_kv
        executor.kv_tiers.most_bytes = before[0]
        assert executor.kv_tiers.store.ram_bytes <= before[1]
        for index in range(2):
            assert np.array_equal(run(executor, kv, [IDS[TOKENS + index]]), expected[1 + index])


def test_who_needs_room_is_told_where_another_has_it(path: Path) -> None:
    """Pieces of the other sequence would have to move, and can go nowhere."""
    with spilled(path) as (executor, kv):
        other = executor.new_kv(TOKENS + 64)
        executor.kv_tiers.most_bytes = 1000
        with pytest.raises(SequenceError, match="have no room") as raised:
            run(executor, other, IDS[:600])
        assert raised.value.kv is other
        assert kv.length == TOKENS


@pytest.mark.parametrize("loop", list(LOOPS))
def test_saved_rows_come_from_all_tiers_and_go_there(path: Path, loop: str) -> None:
    """Blocks come back in another order, as from several threads: what is not there yet is not sent to flash."""
    blocks, placement = TOKENS // 64, LOOPS[loop]  # all full
    with spilling(path, 1, placement=placement) as executor, spilling(path, PIECES, placement=placement) as roomy:
        kv, whole, restored = executor.new_kv(TOKENS + 64), roomy.new_kv(TOKENS + 64), executor.new_kv(TOKENS + 64)
        saved = np.zeros((blocks, kv.rows_layout.block_bytes), np.uint8)
        wanted = saved.copy()
        run(executor, kv, IDS[:TOKENS])
        run(roomy, whole, IDS[:TOKENS])
        assert executor.kv_tiers.cold_pieces > 0
        for index in range(blocks):
            kv.export_block(index, saved[index])
            whole.export_block(index, wanted[index])
        assert np.array_equal(saved, wanted)
        expected = run(executor, kv, IDS[TOKENS : TOKENS + 1])
        kv.truncate(0)
        for index in sorted(range(blocks), key=lambda index: index ^ 5):
            restored.import_block(index, saved[index])
        restored.restored(TOKENS)
        assert executor.kv_tiers.cold_pieces > 0
        assert agree(restored, run(executor, restored, IDS[TOKENS : TOKENS + 1]), expected)
