"""Row 11, and 10: reads that fail while experts are brought to a GPU end that expert, not the step or the run."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.waiting import Counter
from offload import gguf_source
from offload.errors import FlashError
from tests.support.failing_reads import FailingReads
from tests.support.raw_experts import EXPERTS, LAYERS, RawExpertsFile, SlotsOnSimulatedGpu

FOR_EVER = 1 << 30
READS = 6  # of an expert: two runs of each matrix


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RawExpertsFile:
    monkeypatch.setattr(gguf_source, "EIO_PAUSE_S", 0.0)
    return RawExpertsFile(tmp_path / "experts.bin")


@pytest.mark.parametrize("first", range(1, READS + 2))
@pytest.mark.parametrize("times", [1, FOR_EVER])
def test_a_read_of_a_seed(file: RawExpertsFile, first: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "positional_read", FailingReads(first, times))
    with SlotsOnSimulatedGpu(file, slots=1, seeds=[(0, 3)]) as gpu:
        if times == 1 or first > READS:
            gpu.slots.load()
            gpu.check()
            assert gpu.resident() == {(0, 3)}
        else:
            with pytest.raises(FlashError, match="reading at byte"):
                gpu.slots.load()
            assert gpu.resident() == set()


@pytest.mark.parametrize("first", range(1, READS + 1))
def test_a_read_of_an_expert_that_a_step_waits_for(
    file: RawExpertsFile, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SlotsOnSimulatedGpu(file, slots=1, brought=2, seeds=[(0, 3)]) as gpu:
        gpu.slots.load()
        monkeypatch.setattr(gguf_source, "positional_read", FailingReads(first, FOR_EVER))
        counter = Counter()
        call = counter.raise_call()
        gpu.slots.bring(0, [1, 2])
        gpu.slots.call_when_brought(call.address, call.argument)
        counter.wait(1)  # the step does not hang
        assert isinstance(gpu.slots.take_failure(), FlashError)
        monkeypatch.undo()
        places = gpu.slots.bring(0, [1, 2])
        assert gpu.slots.take_failure() is None
        assert gpu.is_whole(0, 1, places[0])
        gpu.check()


def test_a_read_of_an_expert_for_later_steps(
    file: RawExpertsFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = np.zeros((LAYERS, EXPERTS), np.int64)
    tokens[2, 5] = 1
    with SlotsOnSimulatedGpu(file, slots=2, seeds=[(0, 3)]) as gpu:
        gpu.slots.load()
        monkeypatch.setattr(gguf_source, "positional_read", FailingReads(2, FOR_EVER, errno.EIO))
        gpu.slots.used(tokens)
        gpu.slots.settle()
        gpu.slots._arriving[2, 5].outcome()
        gpu.slots.settle()
        assert gpu.resident() == {(0, 3)}
        assert "expert 5 of layer 2 could not be brought to the GPU" in caplog.text
        monkeypatch.undo()
        gpu.slots.used(tokens)  # its place is free again
        gpu.slots.settle()
        assert gpu.slots._arriving[2, 5].outcome() is None
        gpu.slots.settle()
        assert gpu.resident() == {(0, 3), (2, 5)}
        gpu.check()


def test_a_file_that_was_replaced(file: RawExpertsFile) -> None:
    with SlotsOnSimulatedGpu(file, slots=1, brought=1, seeds=[(0, 3)]) as gpu:
        gpu.slots.load()
        os.utime(file.path, ns=(1, 1))
        gpu.slots.bring(2, [0])
        failure = gpu.slots.take_failure()
        assert isinstance(failure, FlashError)
        assert "changed" in str(failure)
