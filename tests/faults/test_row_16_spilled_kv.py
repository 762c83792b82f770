"""Row 16: GPU memory that fails while keys and values lie there, in RAM and on flash: what leaves it finds room.

Allocations of the GPU's memory fail in turn, once or from one on. Right answers or a typed error, within the limit of
RAM, and nothing leaks.
"""

import gc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from offload.errors import DeviceError, SequenceError
from offload.gguf import GGUFFile
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from runtime.architectures import describe
from runtime.executor.hybrid import HybridExecutor
from runtime.executor.program import ProgramKV
from runtime.executor.program.kv_tiers import KVTiers
from tests.support.divergence import max_kl_divergence
from tests.support.failing_device import FailingDevice
from tests.support.hybrid import FAST_GPU
from tests.support.models import FAMILIES, write_model
from tests.support.spilled import IDS, SLOT_BYTES, TIGHT, TOKENS, plain_logits, run, running, staging_bytes

PIECES_IN_RAM = 2  # of every layer: the GPU has two of one layer beside
CHUNK_TOKENS = 256
MORE = 2
STEP = 9  # of the allocations that are made to fail


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama.gguf", FAMILIES["llama"], "F32")


@pytest.fixture(scope="module")
def expected(path: Path) -> list[np.ndarray]:
    return plain_logits(path, TOKENS, MORE, TIGHT)


@pytest.fixture(scope="module")
def most_bytes(path: Path) -> int:
    """RAM that keys and values may take."""
    with running(path, TIGHT) as executor:
        layout = executor.new_kv(TOKENS + 64).layout
    return layout.piece_bytes * PIECES_IN_RAM + staging_bytes(layout, TOKENS // 512 + 1 - PIECES_IN_RAM)


def options() -> dict[str, int]:
    return {"chunk_tokens": CHUNK_TOKENS, "context_tokens": TOKENS + 64}


def attempt(path: Path, device: FailingDevice, most_bytes: int) -> list[np.ndarray] | None:
    """The logits behind the prompt and some tokens; None where it was refused."""
    tiers = KVTiers(ChunkStore(SpillFile(path.parent, SLOT_BYTES)), most_bytes)
    with GGUFFile.open(path) as file:
        try:
            executor = HybridExecutor(describe(file), file, TIGHT, device, kv_tiers=tiers, **options())
        except DeviceError:
            tiers.close()
            return None
        with closing(executor):
            kv = executor.new_kv(TOKENS + 64)
            try:
                found = [run(executor, kv, IDS[:TOKENS])]
                found += [run(executor, kv, IDS[TOKENS + more : TOKENS + more + 1]) for more in range(MORE)]
            except (DeviceError, SequenceError) as error:
                assert error.hint or isinstance(error, DeviceError)
                found = []
            check_ram(tiers, kv, most_bytes)
            return found or None


def check_ram(tiers: KVTiers, kv: ProgramKV, most_bytes: int) -> None:
    assert kv.length in {0, TOKENS, TOKENS + MORE} or kv.length % CHUNK_TOKENS == 0
    assert tiers.taken_bytes <= most_bytes


@pytest.mark.parametrize("lasts", [False, True])
def test_row_16_every_allocation_beside_a_spill(
    path: Path, expected: list[np.ndarray], most_bytes: int, lasts: bool
) -> None:
    answered = failures = 0
    for at in range(1, 10_000, STEP):
        device = FailingDevice(FAST_GPU, at, lasts=lasts)
        found = attempt(path, device, most_bytes)
        gc.collect()
        assert device.free_bytes == device.total_bytes
        if found is not None:
            answered += device.has_failed
            assert max(max_kl_divergence(*pair) for pair in zip(expected, found, strict=True)) <= 1e-6
        failures += found is None
        if not device.has_failed:
            break
    assert found is not None
    assert failures
    assert lasts or answered
