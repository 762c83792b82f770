"""Rows 11 and 14: what cannot be read rightly of a session's KV is computed again, which is said; never used."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from offload import gguf_source
from offload.kv_session_block import Refusal
from offload.kv_session_folder import BlockFolder
from runtime.engine import Engine
from runtime.session_saved import SavedSession
from tests.support.failing_reads import FailingReads
from tests.support.kv_blocks import DIGESTS, SIZE, filled, read
from tests.support.models import FAMILIES, reseeded, write_model
from tests.support.sessions import FIRST, NAME, answer, first_turn, tokens

FLIPS = 300  # files that are read again; 10,000 in memory: tests/unit/offload/test_kv_session_block.py

pytestmark = pytest.mark.usefixtures("no_read_pauses")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write_model(tmp_path_factory.mktemp("models") / "llama.gguf", FAMILIES["llama"], "Q8_0")
    with Engine(path, threads=1, context_tokens=256, gpu="off") as made:
        yield made


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        data = os.pread(file.fileno(), 1, position // 8)
        os.pwrite(file.fileno(), bytes([data[0] ^ 1 << (position % 8)]), position // 8)


def test_row_14_flipped_bits_of_files_are_found_wherever_they_are(tmp_path: Path) -> None:
    blocks = filled(tmp_path)
    rng = np.random.default_rng(4)
    for position in rng.integers(0, SIZE.file_bytes * 8, FLIPS):
        flip(blocks.path(DIGESTS[1]), int(position))
        found, refused = read(blocks, DIGESTS[:2])
        assert 1 not in found
        assert refused is not None
        assert (refused.index, refused.path) == (1, blocks.path(DIGESTS[1]))
        assert refused.fault.refusal is Refusal.DAMAGED
        flip(blocks.path(DIGESTS[1]), int(position))
    assert read(blocks) == ([0, 1, 2, 3], None)


def test_row_14_a_bit_that_flips_once_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = filled(tmp_path)
    reading = gguf_source.positional_read
    flipped: list[int] = []

    def flips_once(descriptor: int, destination: memoryview, offset: int) -> int:
        count = reading(descriptor, destination, offset)
        if len(destination) >= SIZE.file_bytes and not flipped:
            flipped.append(offset)
            destination[5000] ^= 4
        return count

    monkeypatch.setattr(gguf_source, "positional_read", flips_once)
    assert read(blocks) == ([0, 1, 2, 3], None)
    assert flipped


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 9000, 3 * 4096 - 1, 3 * 4096 + 1])
def test_row_14_a_file_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    blocks = filled(tmp_path)
    os.truncate(blocks.path(DIGESTS[2]), length)
    found, refused = read(blocks)
    assert found[:2] == [0, 1]
    assert refused is not None
    assert refused.index == 2
    assert refused.fault.reason == f"it has {length} bytes, not {3 * 4096}"


def test_row_11_failing_reads_refuse_blocks_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = filled(tmp_path)
    for times in (1, 1000):
        for first in range(1, 40):
            reads = FailingReads(first, times, errno.EIO)
            with monkeypatch.context() as patch:
                patch.setattr(gguf_source, "positional_read", reads)
                found, refused = read(blocks)
            if refused is not None:
                assert refused.index not in found
                assert refused.fault.refusal is Refusal.UNREADABLE
            else:
                assert found == [0, 1, 2, 3]
            if reads.calls < first:
                break
        else:
            pytest.fail("no clean run within 40 calls")


def test_row_11_short_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = filled(tmp_path)
    reading = gguf_source.positional_read
    monkeypatch.setattr(
        gguf_source,
        "positional_read",
        lambda descriptor, destination, offset: reading(descriptor, destination[:4096], offset),
    )
    assert read(blocks) == ([0, 1, 2, 3], None)


def test_row_14_a_damaged_session_is_computed_again_and_mended(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turn = first_turn(engine, tmp_path)
    expected, _ = answer(engine, turn)
    for damaged in range(2):
        with SavedSession(NAME, tmp_path) as saved:
            session = engine.session()
            saved.use(engine.rows_keys(), session.kv)
            assert saved._rows is not None
            names = saved._rows.digests(session.kv, FIRST)
            flip(BlockFolder(saved.folder).path(names[damaged]), 50_000)
            pieces, computed = answer(engine, turn, saved)
        assert tokens(pieces) == tokens(expected)
        assert computed == len(turn) - 64 * damaged
        assert f"session {NAME}: tokens from {64 * damaged} on are computed again" in caplog.text
        assert "checksum of its rows is wrong" in caplog.text
        with SavedSession(NAME, tmp_path) as saved:
            pieces, computed = answer(engine, turn, saved)
        assert tokens(pieces) == tokens(expected)
        assert computed == len(turn) - 128
        caplog.clear()


def test_row_14_blocks_under_anothers_name_are_refused(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turn = first_turn(engine, tmp_path)
    expected, _ = answer(engine, turn)
    first, second = sorted((tmp_path / NAME).glob("*.kv"))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with SavedSession(NAME, tmp_path) as saved:
        pieces, computed = answer(engine, turn, saved)
    assert (tokens(pieces), computed) == (tokens(expected), len(turn))
    assert "its rows are of other tokens" in caplog.text


def test_row_10_the_session_of_another_model_is_refused_with_the_reason(engine: Engine, tmp_path: Path) -> None:
    first_turn(engine, tmp_path)
    path = write_model(tmp_path / "other.gguf", reseeded(FAMILIES["llama"], 77), "Q8_0")
    with Engine(path, threads=1, context_tokens=256, gpu="off") as other, SavedSession(NAME, tmp_path) as saved:
        reason = saved.use(other.rows_keys(), other.session().kv)
        assert reason is not None
        assert "its source is llama.gguf, not other.gguf" in reason
        expected, _ = answer(other, FIRST)
        pieces, computed = answer(other, FIRST, saved)
    assert (tokens(pieces), computed) == (tokens(expected), len(FIRST))


def test_row_10_a_model_that_was_written_to_since_is_refused(engine: Engine, tmp_path: Path) -> None:
    path = write_model(tmp_path / "llama.gguf", FAMILIES["llama"], "Q8_0")
    with Engine(path, threads=1, context_tokens=256, gpu="off") as same:
        first_turn(same, tmp_path)
    os.utime(path, (1000, 1000))
    with Engine(path, threads=1, context_tokens=256, gpu="off") as same, SavedSession(NAME, tmp_path) as saved:
        assert saved.use(same.rows_keys(), same.session().kv) == "llama.gguf was written to since"
        assert answer(same, FIRST, saved)[1] == len(FIRST)
