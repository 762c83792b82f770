"""Rows 13, 15, 17: a drive without room ends the sequence that needs it alone; no file is left; RAM keeps its limit."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from offload.errors import FlashError, SequenceError
from offload.kv_spill import SpillFile
from runtime.executor.hybrid import HybridPlacement
from tests.support.models import FAMILIES, write_model
from tests.support.spilled import IDS, LOOPS, PIECES, TOKENS, agree, plain_logits, run, spilling, taken_bytes
from tests.support.stores import FailingFiles

MOST_CALLS = 60

pytestmark = pytest.mark.usefixtures("no_read_pauses")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama.gguf", FAMILIES["llama"], "Q8_0")


@pytest.fixture(scope="module", params=list(LOOPS))
def placement(request: pytest.FixtureRequest) -> HybridPlacement | None:
    return LOOPS[request.param]


@pytest.fixture(scope="module")
def expected(path: Path, placement: HybridPlacement | None) -> list[np.ndarray]:
    return plain_logits(path, TOKENS, 1, placement)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("lasting", [False, True])
def test_row_13_a_failure_at_any_call_ends_one_sequence_at_most(
    path: Path, placement: HybridPlacement | None, expected: list[np.ndarray], code: int, lasting: bool
) -> None:
    failed = 0
    for first in range(1, MOST_CALLS):
        files = FailingFiles(first, MOST_CALLS * 10 if lasting else first, code)
        try:
            pieces = 3 if placement is None else 1  # the GPU has two of one layer
            with spilling(path, pieces, files=files, placement=placement) as executor:
                kv, other = executor.new_kv(TOKENS + 64), executor.new_kv(64)
                run(executor, other, IDS[:20])
                try:
                    assert agree(kv, run(executor, kv, IDS[:TOKENS]), expected[0])
                except SequenceError as error:
                    failed += 1
                    assert error.kv is kv
                    assert "--kv-ram" in (error.hint or "")
                    assert kv.length == error.kept_tokens == 0
                run(executor, other, IDS[20:21])
                assert other.length == 21
        except FlashError as error:  # the file could not be made: said before anything runs
            assert error.hint
            assert first <= 4
        if files.calls < first:
            assert failed > 1
            return
    pytest.fail(f"no clean run within {MOST_CALLS} calls")


def test_row_15_nothing_is_left_on_the_drive(tmp_path: Path) -> None:
    with SpillFile(tmp_path, 8192) as spill:
        slot = spill.write(np.zeros(8192, np.uint8)) if np.zeros(1).ctypes.data % 4096 == 0 else None
        assert list(tmp_path.iterdir()) == [], "a process that is killed leaves no name and so no bytes"
        assert slot is None or spill.num_bytes == 8192
        assert os.fstat(spill._descriptor).st_nlink == 0


def test_row_17_ram_stays_within_its_limit(
    path: Path, placement: HybridPlacement | None, expected: list[np.ndarray]
) -> None:
    pieces, cold = (2, PIECES - 3) if placement is None else (1, 1)
    with spilling(path, pieces, placement=placement) as executor:
        most = executor.kv_tiers.most_bytes
        assert most is not None
        kv = executor.new_kv(TOKENS + 64)
        for first in range(0, TOKENS, 200):
            logits = run(executor, kv, IDS[first : min(first + 200, TOKENS)])
            assert taken_bytes(executor, kv) <= most
        assert agree(kv, logits, expected[0])
        assert executor.kv_tiers.cold_pieces >= cold
        kv.truncate(700)
        assert executor.kv_tiers.cold_pieces <= 2
        run(executor, kv, IDS[700:720])
        assert taken_bytes(executor, kv) <= most


def test_row_17_too_little_ram_is_said_before_tokens_are_wrong(path: Path, placement: HybridPlacement | None) -> None:
    with spilling(path, 3, placement=placement) as executor:
        executor.kv_tiers.most_bytes = 1000
        with pytest.raises(SequenceError, match="have no room in the 1000 bytes"):
            run(executor, executor.new_kv(64), IDS[:8])
