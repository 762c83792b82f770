from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.reference.kv_codes import unpacked_keys, unpacked_values
from offload.kv_session_folder import BlockFolder
from runtime.engine import Engine
from runtime.executor.program.kv import ProgramKV
from runtime.executor.saved_rows import SavedRows
from runtime.session_prefix import PrefixCache, Worth
from runtime.session_rows import RowsKeys
from runtime.session_saved import SavedSession
from tests.support.models import FAMILIES, VARIANTS, prompt, write_model
from tests.support.sessions import FIRST, GREEDY, NAME, answer, first_turn, tokens


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama.gguf", FAMILIES["llama"], "Q8_0")


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine(path, threads=1, context_tokens=256, gpu="off") as made:
        yield made


@pytest.mark.parametrize("capacities", [(64, 64), (700, 2000), (2000, 700)])
def test_rows_move_between_caches_of_any_capacity(capacities: tuple[int, int]) -> None:
    first, second = (ProgramKV(3, 2, 64, 40, capacity) for capacity in capacities)
    first.restored(min(capacities))
    rng = np.random.default_rng(1)
    for layer in range(3):
        for chunk in first.layer_chunks(layer):
            chunk[:] = rng.integers(0, 256, len(chunk), np.uint8)
    assert isinstance(first, SavedRows)
    layout = first.rows_layout
    assert layout == second.rows_layout
    blocks = min(capacities) // layout.block_tokens
    for index in range(blocks):
        told = np.empty(layout.block_bytes, np.uint8)
        first.export_block(index, told)
        second.import_block(index, told)
    second.restored(blocks * layout.block_tokens)
    assert second.length == blocks * layout.block_tokens
    for layer in range(3):
        for unpack in ("keys", "values"):
            theirs = unpacked(second, layer, unpack, second.length)
            assert np.array_equal(unpacked(first, layer, unpack, second.length), theirs)


def unpacked(kv: ProgramKV, layer: int, part: str, count: int) -> NDArray[np.uint32]:
    unpack = unpacked_keys if part == "keys" else unpacked_values
    return unpack(kv.layout.layers[layer], kv.layer_chunks(layer), count).view(np.uint32)


def test_a_block_of_the_wrong_length_is_refused() -> None:
    kv = ProgramKV(3, 2, 64, 40, 64)
    for size in (0, kv.rows_layout.block_bytes - 1, kv.rows_layout.block_bytes + 1):
        with pytest.raises(ValueError, match="a block of"):
            kv.export_block(0, np.empty(size, np.uint8))
    with pytest.raises(ValueError, match="65 tokens in a KV cache of 64"):
        kv.restored(65)


def test_a_restored_session_goes_on_as_if_it_had_never_been_closed(engine: Engine, tmp_path: Path) -> None:
    turn = first_turn(engine, tmp_path)
    expected, computed = answer(engine, turn)
    assert computed == len(turn)
    with SavedSession(NAME, tmp_path) as saved:
        assert saved.document is not None
        pieces, computed = answer(engine, turn, saved)
    assert computed == len(turn) - 128
    assert tokens(pieces) == tokens(expected)


def test_a_session_that_was_saved_keeps_the_blocks_it_needs_alone(engine: Engine, tmp_path: Path) -> None:
    turn = first_turn(engine, tmp_path)
    with SavedSession(NAME, tmp_path) as saved:
        answer(engine, turn, saved)
        assert len(list(saved.folder.glob("*.kv"))) == 2
        answer(engine, prompt(seed=9, length=70), saved)
        assert len(list(saved.folder.glob("*.kv"))) == 1
        assert sorted(path.name for path in saved.folder.iterdir() if path.suffix != ".kv") == ["lock", "session.json"]


def test_a_smaller_context_takes_what_it_has_room_for(path: Path, engine: Engine, tmp_path: Path) -> None:
    first_turn(engine, tmp_path)
    with Engine(path, threads=1, context_tokens=100, gpu="off") as small, SavedSession(NAME, tmp_path) as saved:
        expected, _ = answer(small, FIRST[:90])
        pieces, computed = answer(small, FIRST[:90], saved)
    assert computed == 90 - 64
    assert tokens(pieces) == tokens(expected)


def test_at_least_one_token_is_left_to_compute(engine: Engine, tmp_path: Path) -> None:
    first_turn(engine, tmp_path)
    with SavedSession(NAME, tmp_path) as saved:
        _, computed = answer(engine, FIRST[:128], saved)
    assert computed == 64


def test_threads_do_not_count_but_what_computes_does(path: Path, engine: Engine) -> None:
    gguf, kv = engine._gguf, engine.session().kv
    key = RowsKeys(gguf, engine.plan).of(kv)
    assert key is not None
    settings = engine.plan.settings
    same = replace(engine.plan, settings=replace(settings, threads=7, prefill_chunk_tokens=16, context_tokens=99))
    assert RowsKeys(gguf, same).of(kv) == key
    other = replace(engine.plan, settings=replace(settings, loop="hybrid"))
    its = RowsKeys(gguf, other).of(kv)
    assert its is not None
    assert "computed by the program loop" in next(key.differences(its))


def test_divisors_of_angles_are_in_the_key_of_their_session(tmp_path: Path) -> None:
    path = write_model(tmp_path / "phi3.gguf", VARIANTS["phi3-long"])
    with Engine(path, threads=1, context_tokens=64, gpu="off") as engine:
        keys = engine.rows_keys()
        short, long = (keys.of(engine.executor.new_kv(capacity)) for capacity in (32, 33))
        assert short is not None
        assert long is not None
        assert "rope_factors_short" in short.layout
        assert "rope_factors_long" in long.layout


def test_a_loop_whose_rows_cannot_be_saved_keeps_what_was_said(path: Path, tmp_path: Path) -> None:
    with Engine(path, threads=1, context_tokens=256, loop="sequential") as slow, SavedSession(NAME, tmp_path) as saved:
        session = slow.session()
        assert saved.use(slow.rows_keys(), session.kv) == "KV of this loop cannot be saved"
        session.rows = saved
        list(slow.generate(FIRST[:5], max_tokens=2, session=session))
        saved.save([{"role": "user", "content": "hello"}], session)
        assert not list(saved.folder.glob("*.kv"))
    with SavedSession(NAME, tmp_path) as saved:
        assert saved.document is not None
        assert saved.document.messages == ({"role": "user", "content": "hello"},)


def test_of_conversations_the_first_prompt_is_kept(engine: Engine, tmp_path: Path) -> None:
    folder = BlockFolder(tmp_path / "prefixes", most_bytes=1 << 30)
    try:
        engine.rows = PrefixCache(engine.rows_keys(), folder, Worth.FIRST)
        session = engine.session()
        first = list(engine.generate(FIRST[:70], max_tokens=8, sampling=GREEDY, session=session))
        assert len(folder.held()) == 1
        longer = [*FIRST[:70], *(piece.token_id for piece in first), *prompt(seed=5, length=90)[1:]]
        list(engine.generate(longer, max_tokens=4, sampling=GREEDY, session=session))
        assert len(folder.held()) == 1
        again, computed = answer(engine, FIRST[:70])
        assert computed == 6
        assert tokens(again) == tokens(first)
    finally:
        engine.rows = None


def test_of_a_batch_what_two_prompts_share_is_kept(engine: Engine, tmp_path: Path) -> None:
    folder = BlockFolder(tmp_path / "prefixes", most_bytes=1 << 30)
    prompts = [[*FIRST[:130], *prompt(seed=seed, length=80)[1:]] for seed in range(20, 24)]
    expected = engine.generate_batch(prompts, max_tokens=5, sampling=GREEDY)
    try:
        engine.rows = PrefixCache(engine.rows_keys(), folder, Worth.SHARED)
        engine.generate_batch(prompts[:1], max_tokens=5, sampling=GREEDY)
        assert folder.held() == []
        found = engine.generate_batch(prompts, max_tokens=5, sampling=GREEDY)
        assert len(folder.held()) == 2 + 1  # and the third block of the prompt that came twice
    finally:
        engine.rows = None
    assert found == expected
