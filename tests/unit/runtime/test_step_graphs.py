"""Steps as graphs, on a simulated GPU that captures: given as one piece once that was seen to change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_kernels.simulated import SimulatedDevice
from gpu_kernels.simulated_stream import SimulatedStream
from gpu_kernels.torch_kernels import TorchKernels
from offload.gguf import GGUFFile
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from runtime.executor.hybrid.recording import Recording
from runtime.executor.hybrid.step_graphs import USES_BEFORE
from runtime.executor.program.kv_tiers import KVTiers
from tests.support import models
from tests.support.hybrid import FAST_GPU, greedy, hybrid, model_of

IDS = models.prompt(length=20)


class GraphStream(SimulatedStream):
    """Keeps what is captured, and gives it anew."""

    can_capture = True

    def __init__(self, *arguments: Any) -> None:
        self.captured: list[int] = []
        self.replays = 0
        self.fault = ""
        self._kept: list[Any] | None = None
        super().__init__(*arguments)

    def capture(self, give: Callable[[], None]) -> Callable[[], None]:
        self._kept = []
        give()
        kept, self._kept = self._kept, None
        self.captured.append(len(kept))
        if self.fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> None:
            self.replays += 1
            if self.fault == "replay":
                raise RuntimeError("an illegal instruction")
            for part in kept if self.fault != "nothing" else []:
                self._give(part)

        return replay

    def _give(self, work: Any) -> None:
        if self._kept is None:
            super()._give(work)
        else:
            self._kept.append(work)


class GraphDevice(SimulatedDevice):
    """Says that it is a real one."""

    is_simulated = False

    def __init__(self) -> None:
        super().__init__(FAST_GPU)
        self.stream_of_steps: GraphStream | None = None

    def stream(self, name: str) -> SimulatedStream:
        stream = GraphStream(name, self)
        self._streams.append(stream)
        if name == "compute":
            self.stream_of_steps = stream
        return stream


def placements_of(path: Path) -> list[HybridPlacement]:
    model = model_of(path)
    half = frozenset({0})
    return [HybridPlacement.whole(model), HybridPlacement(half, frozenset({1}), output=True)]


def found(path: Path, placement: HybridPlacement, fault: str = "") -> tuple[list[int], np.ndarray, GraphStream]:
    device = GraphDevice()
    with GGUFFile.open(path) as file:
        options = {"kernels": TorchKernels(), "context_tokens": 64}
        runner = HybridExecutor(describe(file), file, placement, device, **options)
        try:
            assert device.stream_of_steps is not None
            device.stream_of_steps.fault = fault
            return *greedy(runner, IDS, 9), device.stream_of_steps
        finally:
            runner.close()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_steps_that_come_again_are_graphs(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = models.write_model(tmp_path / "m.gguf", models.spec_of(name), "Q8_0")
    for placement in placements_of(path):
        with hybrid(path, placement) as runner:
            tokens, rows = greedy(runner, IDS, 9)
        ours, our_rows, stream = found(path, placement)
        assert ours == tokens
        np.testing.assert_array_equal(our_rows.view(np.uint32), rows.view(np.uint32))
        assert len(stream.captured) == 1
        assert stream.replays == 8 - USES_BEFORE
    assert not caplog.records


@pytest.mark.parametrize("fault", ["capture", "replay", "nothing"])
def test_a_graph_that_fails_is_told_of_once_and_changes_nothing(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = models.write_model(tmp_path / "m.gguf", models.spec_of("llama"), "Q8_0")
    placement = placements_of(path)[0]
    with hybrid(path, placement) as runner:
        tokens, rows = greedy(runner, IDS, 9)
    ours, our_rows, stream = found(path, placement, fault)
    assert ours == tokens
    np.testing.assert_array_equal(our_rows.view(np.uint32), rows.view(np.uint32))
    assert len(stream.captured) == 1
    assert [record.getMessage().count("piece by piece") for record in caplog.records] == [1]


def test_steps_that_read_keys_and_values_from_flash_are_graphs_too(tmp_path: Path) -> None:
    """What the first try has read is read again for the second."""
    path, ids = models.write_model(tmp_path / "m.gguf", models.spec_of("llama"), "Q8_0"), models.prompt(length=1100)
    rows, device = [], GraphDevice()
    for gpu in (SimulatedDevice(FAST_GPU), device):
        tiers = KVTiers(ChunkStore(SpillFile(tmp_path, 1 << 18)))
        options = {"kernels": TorchKernels(), "context_tokens": 1200, "kv_tiers": tiers}
        with GGUFFile.open(path) as file:
            runner = HybridExecutor(describe(file), file, HybridPlacement.whole(model_of(path)), gpu, **options)
            try:
                kv = runner.new_kv(1200)
                runner.forward([Step(ids, kv)])
                for piece in range(2):
                    kv.move_piece()
                    kv.evict(piece)
                rows.append([runner.forward([Step([token], kv)])[0] for token in ids[:8]])
                assert tiers.store.cold_bytes > 0
            finally:
                runner.close()
    assert device.stream_of_steps is not None
    assert len(device.stream_of_steps.captured) == 1
    np.testing.assert_array_equal(np.concatenate(rows[1]), np.concatenate(rows[0]))


def test_what_was_never_done_cannot_be_captured() -> None:
    device = GraphDevice()
    try:
        with pytest.raises(ValueError, match="never done"):
            Recording(device.stream("compute")).capture()
    finally:
        device.close()


def test_a_simulated_gpu_has_no_graphs() -> None:
    device = SimulatedDevice(FAST_GPU)
    try:
        stream = device.stream("compute")
        assert not stream.can_capture
        with pytest.raises(NotImplementedError):
            stream.capture(lambda: None)
    finally:
        device.close()
