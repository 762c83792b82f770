"""Row 17: an allocation for keys and values that fails moves others to flash, or ends one sequence.

Walks through the allocations of a prompt and its answer, each failing once, and all from one on; with experts in RAM
and from flash.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from offload import kv_chunks
from offload.errors import SequenceError
from offload.memory import reserved_bytes
from runtime.executor.hybrid.kv import HybridKV
from runtime.executor.program import kv_cold
from tests.support.models import spec_of, write_model
from tests.support.spilled import IDS, TIGHT, TOKENS, agree, plain_logits, run, spilling

MORE = 2
MOST_CALLS = 80


class FailingMemory:
    """Stands for `reserved_bytes`: fails at the calls `first` to `last`."""

    def __init__(self, first: int, last: int) -> None:
        self.failing = range(first, last + 1)
        self.calls = 0

    def __call__(self, num_bytes: int, *, huge_pages: bool) -> NDArray[np.uint8]:
        self.calls += 1
        if self.calls in self.failing:
            raise MemoryError(f"{num_bytes} bytes")
        return reserved_bytes(num_bytes, huge_pages=huge_pages)


@pytest.fixture(scope="module", params=[{}, {"slots": 64}, {"placement": TIGHT}], ids=["in RAM", "streamed", "hybrid"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "moe.gguf", spec_of("qwen3moe"), "Q8_0")


@pytest.fixture(scope="module")
def expected(path: Path, options: dict[str, Any]) -> list[NDArray[np.float32]]:
    return plain_logits(path, TOKENS, MORE, options.get("placement"))


def failing(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> FailingMemory:
    memory = FailingMemory(first, last)
    monkeypatch.setattr(kv_chunks, "reserved_bytes", memory)
    monkeypatch.setattr(kv_cold, "reserved_bytes", memory)
    return memory


def rows_of(executor, kv) -> Iterator[NDArray[np.float32]]:  # type: ignore[no-untyped-def]
    yield run(executor, kv, IDS[:TOKENS])
    for index in range(MORE):
        yield run(executor, kv, IDS[TOKENS + index : TOKENS + index + 1])


@pytest.mark.parametrize("lasting", [False, True])
def test_row_17_memory_that_fails_at_any_call_is_no_wrong_token(
    path: Path,
    options: dict[str, Any],
    expected: list[NDArray[np.float32]],
    lasting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = survived = 0
    with spilling(path, 3, **options) as executor:
        for first in range(1, MOST_CALLS, 3 if lasting else 1):
            memory = failing(monkeypatch, first, MOST_CALLS * 10 if lasting else first)
            kv = executor.new_kv(TOKENS + 64)
            try:
                for row, wanted in zip(rows_of(executor, kv), expected, strict=True):
                    assert agree(kv, row, wanted)
                survived += memory.calls >= first
            except SequenceError as error:
                ended += 1
                assert error.kv is kv
                assert error.hint
                assert error.kept_tokens <= kv.length
                kv.truncate(error.kept_tokens)
            failing(monkeypatch, 0, 0)
            on_gpu = {1} if isinstance(kv, HybridKV) else set()
            counts = {layer: len(kv.chunks(layer)) for layer in range(executor.model.block_count)}
            assert {counts[layer] for layer in counts.keys() - on_gpu} == {kv.pieces}
            assert all(counts[layer] == kv.ram_pieces for layer in on_gpu)
            calls = memory.calls
            del kv
            other = executor.new_kv(64)
            run(executor, other, IDS[:20])
            assert other.length == 20, "others go on"
            del other
            if calls < first:
                assert ended if lasting else survived
                return
    pytest.fail(f"no clean run within {MOST_CALLS} calls")
