"""Rows 11, 12: a read that fails while a layer is attended to range by range ends one sequence, wherever it fails."""

from pathlib import Path

import numpy as np
import pytest

from offload import gguf_source, kv_chunks
from offload.errors import SequenceError
from tests.support.failing_reads import FailingReads
from tests.support.models import FAMILIES, write_model
from tests.support.spilled import IDS, TOKENS, plain_logits, run, spilling

pytestmark = pytest.mark.usefixtures("no_read_pauses")

RING_SLOTS = 2  # so that every chunk is a range of its own


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama.gguf", FAMILIES["llama"], "Q8_0")


@pytest.mark.parametrize("tokens", [1, 40], ids=["a token", "a prompt"])
def test_row_11_a_range_that_cannot_be_read_ends_its_sequence_alone(
    path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain_logits(path, TOKENS, 0)[0]
    monkeypatch.setattr(kv_chunks, "RING_BYTES", 0)
    monkeypatch.setattr(kv_chunks, "RING_SLOTS", RING_SLOTS)
    with spilling(path, 2) as executor:
        kv, other = executor.new_kv(TOKENS + 64), executor.new_kv(64)
        run(executor, kv, IDS[: TOKENS - tokens])
        assert executor.kv_tiers.cold_pieces > RING_SLOTS
        for first in range(1, 6):
            with monkeypatch.context() as patch:
                patch.setattr(gguf_source, "positional_read", FailingReads(first, 10**6))
                with pytest.raises(SequenceError, match=r"were lost: .*injected") as raised:
                    run(executor, kv, IDS[TOKENS - tokens : TOKENS])
            assert raised.value.kv is kv
            assert kv.length == TOKENS - tokens, "a pass that fails changes nothing"
            run(executor, other, IDS[:20])
            other.truncate(0)
        assert np.array_equal(run(executor, kv, IDS[TOKENS - tokens : TOKENS]), expected)
