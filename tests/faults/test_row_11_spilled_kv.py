"""Rows 10, 11, 12, 14: KV that cannot be read back from flash is never used; its sequence is told, and can go on."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from offload import gguf_source
from offload.errors import SequenceError
from offload.flash import ReadMode
from offload.kv_spill import SpillFile
from runtime.executor.hybrid import HybridPlacement
from runtime.executor.program import ProgramExecutor, ProgramKV
from tests.support.failing_reads import FailingReads
from tests.support.models import FAMILIES, write_model
from tests.support.spilled import IDS, LOOPS, TOKENS, agree, plain_logits, run, spilling

MORE = 3

pytestmark = pytest.mark.usefixtures("no_read_pauses")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama.gguf", FAMILIES["llama"], "Q8_0")


@pytest.fixture(scope="module", params=list(LOOPS))
def placement(request: pytest.FixtureRequest) -> HybridPlacement | None:
    return LOOPS[request.param]


@pytest.fixture(scope="module")
def expected(path: Path, placement: HybridPlacement | None) -> list[np.ndarray]:
    return plain_logits(path, TOKENS, MORE, placement)


@contextmanager
def filled(
    path: Path, placement: HybridPlacement | None, **options: object
) -> Iterator[tuple[ProgramExecutor, ProgramKV, SpillFile]]:
    """A sequence of `TOKENS` of which some pieces lie on flash."""
    pieces = 2 if placement is None else 1  # the GPU has two of one layer
    with spilling(path, pieces, placement=placement, **options) as executor:
        kv = executor.new_kv(TOKENS + 64)
        run(executor, kv, IDS[:TOKENS])
        assert executor.kv_tiers.cold_pieces >= pieces
        spill = executor.kv_tiers.store.spill
        assert spill is not None
        yield executor, kv, spill


def next_logits(executor: ProgramExecutor, kv: ProgramKV) -> list[np.ndarray]:
    return [run(executor, kv, IDS[TOKENS + index : TOKENS + index + 1]) for index in range(MORE)]


def lost_and_computed_again(executor: ProgramExecutor, kv: ProgramKV, expected: list[np.ndarray], error: SequenceError):
    assert error.kv is kv
    assert error.hint
    assert error.kept_tokens in (0, 512)
    assert TOKENS <= kv.length < TOKENS + MORE, "a pass that fails changes nothing"
    kv.truncate(error.kept_tokens)
    found = [run(executor, kv, IDS[error.kept_tokens : TOKENS]), *next_logits(executor, kv)]
    assert agree(kv, np.concatenate(found), np.concatenate(expected))


@pytest.mark.parametrize("first", [1, 2, 5])
def test_row_11_a_read_that_fails_once_is_made_again(
    path: Path,
    placement: HybridPlacement | None,
    expected: list[np.ndarray],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with filled(path, placement) as (executor, kv, _):
        reads = FailingReads(first, 1)
        monkeypatch.setattr(gguf_source, "positional_read", reads)
        for logits, wanted in zip(next_logits(executor, kv), expected[1:], strict=True):
            assert np.array_equal(logits, wanted)
        assert reads.calls > first


@pytest.mark.parametrize("first", [1, 3, 4])
@pytest.mark.parametrize("mode", list(ReadMode))
def test_row_11_what_cannot_be_read_is_computed_again(
    path: Path,
    placement: HybridPlacement | None,
    expected: list[np.ndarray],
    first: int,
    mode: ReadMode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with filled(path, placement, mode=mode) as (executor, kv, _):
        executor.kv_tiers.most_bytes = (executor.kv_tiers.most_bytes or 0) + 2 * kv.layout.piece_bytes
        other = executor.new_kv(64)
        alone = run(executor, other, IDS[:40])
        with monkeypatch.context() as patch:
            patch.setattr(gguf_source, "positional_read", FailingReads(first, 10**6))
            with pytest.raises(SequenceError, match=r"were lost: .*injected") as raised:
                next_logits(executor, kv)
            other.truncate(0)
            assert np.array_equal(run(executor, other, IDS[:40]), alone), "others go on"
        lost_and_computed_again(executor, kv, expected, raised.value)


def test_row_12_a_read_that_hangs_is_given_up(
    path: Path, placement: HybridPlacement | None, expected: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open, read = threading.Event(), gguf_source.positional_read

    def hang(descriptor: int, destination: memoryview, offset: int) -> int:
        assert is_open.wait(30)
        return read(descriptor, destination, offset)

    with filled(path, placement, deadline_s=0.3) as (executor, kv, _):
        monkeypatch.setattr(gguf_source, "positional_read", hang)
        with pytest.raises(SequenceError, match=r"has taken more than 0.3 s") as raised:
            next_logits(executor, kv)
        is_open.set()
        lost_and_computed_again(executor, kv, expected, raised.value)


@pytest.mark.parametrize("mode", list(ReadMode))
def test_row_14_a_flipped_bit_is_never_used(
    path: Path, placement: HybridPlacement | None, expected: list[np.ndarray], mode: ReadMode
) -> None:
    with filled(path, placement, mode=mode) as (executor, kv, spill):
        chunk = kv.chunks(1)[0]
        assert chunk.slot is not None
        flip(spill, chunk.slot.number * spill.slot_bytes + 777)
        with pytest.raises(SequenceError, match="are not what was written") as raised:
            next_logits(executor, kv)
        assert raised.value.kept_tokens == 0
        lost_and_computed_again(executor, kv, expected, raised.value)


def test_row_10_a_file_that_was_cut_is_noticed(
    path: Path, placement: HybridPlacement | None, expected: list[np.ndarray]
) -> None:
    with filled(path, placement) as (executor, kv, spill):
        os.ftruncate(spill._descriptor, 4096)
        with pytest.raises(SequenceError, match="were lost"):
            next_logits(executor, kv)
        kv.truncate(0)
        assert np.array_equal(run(executor, kv, IDS[:TOKENS]), expected[0])


def flip(spill: SpillFile, place: int) -> None:
    """A bit of a file without a name."""
    descriptor = os.open(f"/proc/self/fd/{spill._descriptor}", os.O_RDWR)
    byte = os.pread(descriptor, 1, place)
    os.pwrite(descriptor, bytes([byte[0] ^ 4]), place)
    os.fsync(descriptor)
    os.close(descriptor)


def test_eio_is_what_is_injected() -> None:
    with pytest.raises(OSError, match="injected") as raised:
        FailingReads(1, 1)(0, memoryview(bytearray(1)), 0)
    assert raised.value.errno == errno.EIO
