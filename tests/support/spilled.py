"""An executor whose keys and values go to flash, and a small model for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.flash import DEADLINE_S, ReadMode
from offload.kv_chunks import ChunkStore, staging_slots
from offload.kv_spill import SpillFile
from offload.store_files import FILES, Files
from runtime.executor import Step
from runtime.executor.hybrid import HybridPlacement
from runtime.executor.hybrid.kv import HybridKV
from runtime.executor.program import ProgramExecutor, ProgramKV
from runtime.executor.program.kv_tiers import KVTiers, chunk_bytes
from runtime.executor.program.sequence_layout import SequenceLayout
from tests.support import models, programs
from tests.support.divergence import max_kl_divergence
from tests.support.hybrid import hybrid

SLOT_BYTES = 1 << 18
PIECES = 5
TOKENS = 512 * PIECES
IDS = models.prompt(length=TOKENS + 64)
TIGHT = HybridPlacement(frozenset({1}), frozenset(), output=True, kv_tokens=1024)  # most of layer 1 in RAM too
LOOPS = {"program": None, "hybrid": TIGHT}


@contextmanager
def spilling(
    path: Path,
    pieces: int,
    *,
    files: Files = FILES,
    mode: ReadMode = ReadMode.DIRECT,
    deadline_s: float = DEADLINE_S,
    slots: int | None = None,
    placement: HybridPlacement | None = None,
) -> Iterator[ProgramExecutor]:
    """An executor with RAM for so many pieces of a sequence of `PIECES`, and for reading the others.

    `slots`: for experts or layers, which come from flash then; None where RAM has all. `placement`: of a hybrid.
    """
    layout = _layout(path)
    most = layout.piece_bytes * pieces + staging_bytes(layout, PIECES + 1 - pieces)
    spill = SpillFile(path.parent, SLOT_BYTES, files=files, mode=mode, deadline_s=deadline_s)
    tiers = KVTiers(ChunkStore(spill), most)
    if slots is not None:
        with programs.streaming(path, slots, mode=mode, deadline_s=deadline_s, kv_tiers=tiers) as (streaming, _):
            yield streaming
        return
    with running(path, placement, kv_tiers=tiers) as executor:
        yield executor


@contextmanager
def running(
    path: Path, placement: HybridPlacement | None, kv_tiers: KVTiers | None = None
) -> Iterator[ProgramExecutor]:
    """The program loop's, or a hybrid's where there is a placement."""
    if placement is None:
        with programs.executor(path, kv_tiers=kv_tiers) as executor:
            yield executor
        return
    with hybrid(path, placement, kv_tiers=kv_tiers, chunk_tokens=256, context_tokens=TOKENS + 64) as executor:
        yield executor


def staging_bytes(layout: SequenceLayout, whole: int) -> int:
    """Bytes of the memory that chunks on flash are read to: see `staging_slots`."""
    size = chunk_bytes(layout)
    return staging_slots(len(layout.layers), size, whole) * size


def taken_bytes(executor: ProgramExecutor, kv: ProgramKV) -> int:
    """RAM of all chunks and of what they are read to."""
    return executor.kv_tiers.store.ram_bytes + staging_bytes(kv.layout, executor.kv_tiers.cold_pieces)


def run(executor: ProgramExecutor, kv: ProgramKV, ids: Sequence[int]) -> NDArray[np.float32]:
    """The logits behind the last token."""
    return executor.forward([Step(ids, kv)])[0]


def agree(kv: ProgramKV, found: NDArray[np.float32], wanted: NDArray[np.float32]) -> bool:
    """Whether logits are the same to the bit.

    Nearly, of a hybrid: when its old pieces move to RAM depends on others, and on that the order of sums.
    """
    if isinstance(kv, HybridKV):
        return max_kl_divergence(wanted, found) <= 1e-6
    return np.array_equal(found, wanted)


def assert_grow_together(
    executor: ProgramExecutor, tokens: int, expected: Sequence[NDArray[np.float32]]
) -> list[ProgramKV]:
    """Two sequences that grow in turn keep to RAM's limit; their logits are those behind `tokens` and one more."""
    most = executor.kv_tiers.most_bytes or 0
    caches = [executor.new_kv(tokens + 64) for _ in range(2)]
    for first in range(0, tokens, 250):
        for kv in caches:
            logits = run(executor, kv, IDS[first : min(first + 250, tokens)])
            assert taken_bytes(executor, kv) <= most
    assert np.array_equal(logits, expected[0])
    steps = executor.forward([Step([IDS[tokens]], kv) for kv in caches])
    assert all(np.array_equal(row, expected[1]) for row in steps)
    return caches


def plain_logits(
    path: Path, tokens: int, more: int, placement: HybridPlacement | None = None
) -> list[NDArray[np.float32]]:
    """Behind a prompt of so many tokens and those that follow one by one, with nothing on flash."""
    with running(path, placement) as executor:
        kv = executor.new_kv(tokens + more)
        return [run(executor, kv, IDS[:tokens])] + [
            run(executor, kv, IDS[tokens + index : tokens + index + 1]) for index in range(more)
        ]


def _layout(path: Path):
    with programs.executor(path) as executor:
        return executor.new_kv(TOKENS + 64).layout
