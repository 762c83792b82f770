"""An executor whose keys and values go to flash, and a small model for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.flash import DEADLINE_S, ReadMode
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from offload.store_files import FILES, Files
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV
from runtime.executor.program.kv_tiers import KVTiers, staging_bytes
from tests.support import models, programs

SLOT_BYTES = 1 << 18
PIECES = 5
TOKENS = 512 * PIECES
IDS = models.prompt(length=TOKENS + 64)


@contextmanager
def spilling(
    path: Path,
    pieces: int,
    *,
    files: Files = FILES,
    mode: ReadMode = ReadMode.DIRECT,
    deadline_s: float = DEADLINE_S,
    slots: int | None = None,
) -> Iterator[ProgramExecutor]:
    """An executor with RAM for so many pieces of a sequence of `PIECES`, and for reading the others.

    `slots`: for experts or layers, which come from flash then; None where RAM has all.
    """
    layout = _layout(path)
    most = layout.piece_bytes * pieces + staging_bytes(layout, PIECES + 1 - pieces)
    spill = SpillFile(path.parent, SLOT_BYTES, files=files, mode=mode, deadline_s=deadline_s)
    tiers = KVTiers(ChunkStore(spill), most)
    if slots is not None:
        with programs.streaming(path, slots, mode=mode, deadline_s=deadline_s, kv_tiers=tiers) as (streaming, _):
            yield streaming
        return
    with programs.executor(path, kv_tiers=tiers) as executor:
        yield executor


def taken_bytes(executor: ProgramExecutor, kv: ProgramKV) -> int:
    """RAM of all chunks and of what they are read to."""
    return executor.kv_tiers.store.ram_bytes + staging_bytes(kv.layout, executor.kv_tiers.cold_pieces)


def run(executor: ProgramExecutor, kv: ProgramKV, ids: Sequence[int]) -> NDArray[np.float32]:
    """The logits behind the last token."""
    return executor.forward([Step(ids, kv)])[0]


def plain_logits(path: Path, tokens: int, more: int) -> list[NDArray[np.float32]]:
    """Behind a prompt of so many tokens and those that follow one by one, with all in RAM."""
    with programs.executor(path) as executor:
        kv = executor.new_kv(tokens + more)
        return [run(executor, kv, IDS[:tokens])] + [
            run(executor, kv, IDS[tokens + index : tokens + index + 1]) for index in range(more)
        ]


def _layout(path: Path):
    with programs.executor(path) as executor:
        return executor.new_kv(TOKENS + 64).layout
