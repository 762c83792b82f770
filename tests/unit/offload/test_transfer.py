"""Transfers between host memory and a simulated GPU: bytes arrive whole, the urgent first, and what fails says so."""

import ctypes
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.waiting import Counter
from gpu_kernels.device import Cost
from gpu_kernels.matrix import GpuMatrix, arrange
from gpu_kernels.simulated import SimulatedDevice
from offload.errors import DeviceError, FlashError
from offload.flash import Priority
from offload.transfer import MatrixRows, TransferEngine
from offload.transfer_ring import Buffer

BUFFER = 4096
FAST = "sim:vram=16MiB,bw=10GB/s,link=1GB/s,tflops=1"
SLOW = "sim:vram=16MiB,bw=10GB/s,link=0.004096GB/s,tflops=1,link_latency=0us"  # 1 ms a chunk


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    simulated = SimulatedDevice(FAST)
    yield simulated
    simulated.close()


@pytest.fixture
def engine(device: SimulatedDevice) -> Iterator[TransferEngine]:
    with TransferEngine(device, buffer_bytes=BUFFER) as transfers:
        yield transfers


def some_bytes(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes that tell where they belong."""
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


@pytest.mark.parametrize("count", [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 9 * BUFFER + 5])
def test_there_and_back(device: SimulatedDevice, engine: TransferEngine, count: int) -> None:
    data, back = some_bytes(count), np.zeros(count, np.uint8)
    target = device.empty((count,), torch.uint8)
    engine.upload(data, target).wait()
    assert np.array_equal(target.numpy(), data)
    engine.download(target, back).wait()
    assert np.array_equal(back, data)
    assert engine.uploaded_bytes == count
    assert (engine.upload_bytes_per_s > 0) == (count > 0)
    assert engine.upload_bytes_per_s <= 1e9


def test_tensors_of_any_type(device: SimulatedDevice, engine: TransferEngine) -> None:
    data = np.arange(5000, dtype=np.float32).reshape(50, 100)
    target = device.empty((50, 100), torch.float32)
    engine.upload(data.view(np.uint8), target).wait()
    assert np.array_equal(target.numpy(), data)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5 * BUFFER), st.sampled_from(Priority)), max_size=8))
def test_many_at_once(requests: list[tuple[int, Priority]]) -> None:
    device = SimulatedDevice(FAST)
    with TransferEngine(device, buffers=3, buffer_bytes=BUFFER) as engine:
        uploads = []
        for number, (count, priority) in enumerate(requests):
            data, target = some_bytes(count, number), device.empty((count,), torch.uint8)
            uploads.append((data, target, engine.upload(data, target, priority=priority)))
        for data, target, upload in uploads:
            upload.wait()
            assert upload.is_done
            assert np.array_equal(target.numpy(), data)
    device.close()


@pytest.mark.parametrize("slots", [None, 3])
def test_raw_rows_are_arranged_on_the_gpu(device: SimulatedDevice, engine: TransferEngine, slots: int | None) -> None:
    rows, row_bytes = 301, 2 * 34  # Q8_0, 64 columns
    matrix = GpuMatrix.allocate("Q8_0", rows + 7, 64, slots=slots, empty=device.empty)
    raw = some_bytes(rows * row_bytes)
    slot = None if slots is None else 2
    engine.upload(raw, MatrixRows(matrix, slot, first_row=7)).wait()
    expected = arrange(torch.from_numpy(raw.reshape(rows, row_bytes)), "Q8_0")
    stored = (matrix if slot is None else matrix.slot(slot)).rows_from(7, rows)
    for plane, wanted in zip(stored.planes, expected.planes, strict=True):
        assert torch.equal(plane.view(torch.uint8), wanted.view(torch.uint8))
    gpu, to_gpu, _ = device.lanes()
    assert {task.name for task in gpu.tasks} == {"arrange"}
    assert len(to_gpu.tasks) == len(gpu.tasks) == -(-rows // (BUFFER // row_bytes))


def test_a_source_that_fills(device: SimulatedDevice, engine: TransferEngine) -> None:
    data, seen = some_bytes(3 * BUFFER), []

    def fill(offset: int, memory: NDArray[np.uint8]) -> None:
        seen.append(offset)
        memory[:] = data[offset : offset + len(memory)]

    target = device.empty((3 * BUFFER,), torch.uint8)
    engine.upload(fill, target, num_bytes=len(data)).wait()
    assert seen == [0, BUFFER, 2 * BUFFER]
    assert np.array_equal(target.numpy(), data)
    with pytest.raises(ValueError, match="does not tell how many bytes"):
        engine.upload(fill, target)


def test_urgent_uploads_overtake(device: SimulatedDevice) -> None:
    slow = SimulatedDevice(SLOW)
    with TransferEngine(slow, buffer_bytes=BUFFER) as engine:
        small, large = slow.empty((BUFFER,), torch.uint8), slow.empty((40 * BUFFER,), torch.uint8)
        ended: list[str] = []
        ahead = engine.upload(np.zeros(40 * BUFFER, np.uint8), large, priority=Priority.PREFETCH)
        demand = engine.upload(np.zeros(BUFFER, np.uint8), small, ended=lambda error: ended.append("demand"))
        demand.wait()
        assert not ahead.is_done
        ahead.wait()
        assert ended == ["demand"]
    slow.close()


def test_another_stream_waits_for_an_upload(device: SimulatedDevice, engine: TransferEngine) -> None:
    data, target = some_bytes(10 * BUFFER), device.empty((10 * BUFFER,), torch.uint8)
    compute, seen = device.stream("compute"), list[bool]()
    event = engine.upload(data, target).wait_given()
    assert event is not None
    compute.wait(event)
    compute.launch(lambda: seen.append(np.array_equal(target.numpy(), data)), Cost())
    compute.synchronize()
    assert seen == [True]


def test_what_follows_an_upload(device: SimulatedDevice, engine: TransferEngine) -> None:
    counter, target = Counter(), device.empty((10 * BUFFER,), torch.uint8)
    call = counter.raise_call()
    data = some_bytes(10 * BUFFER)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(call.address)
    engine.upload(data, target, ended=lambda error: function(call.argument))
    counter.wait(1)
    assert np.array_equal(target.numpy(), data)


def test_copies_share_the_time_with_kernels() -> None:
    """Uploads beside a busy GPU take the link's time, not the sum."""
    device = SimulatedDevice("sim:vram=64MiB,bw=1GB/s,link=0.2GB/s,tflops=1")
    compute = device.stream("compute")
    with TransferEngine(device) as engine:
        target = device.empty((8 << 20,), torch.uint8)
        for _ in range(4):
            compute.launch(lambda: None, Cost(num_bytes=10_000_000))
        engine.upload(np.zeros(8 << 20, np.uint8), target).wait()
        compute.synchronize()
    gpu, to_gpu, _ = device.lanes()
    assert gpu.busy_s == pytest.approx(0.04, rel=0.01)
    assert to_gpu.busy_s == pytest.approx((8 << 20) / 0.2e9, rel=0.01)
    assert to_gpu.tasks[0].start_s < gpu.tasks[-1].end_s
    device.close()


def test_wrong_sizes(device: SimulatedDevice, engine: TransferEngine) -> None:
    target = device.empty((10,), torch.uint8)
    with pytest.raises(ValueError, match="11 bytes for a tensor of 10"):
        engine.upload(some_bytes(11), target)
    with pytest.raises(ValueError, match="a tensor of 10 bytes for 9"):
        engine.download(target, some_bytes(9))
    with pytest.raises(ValueError, match="not contiguous"):
        engine.upload(some_bytes(5), target[::2])
    matrix = GpuMatrix.allocate("Q8_0", 4, 32, slots=2, empty=device.empty)
    for rows in (MatrixRows(matrix, 2), MatrixRows(matrix), MatrixRows(matrix, 1, 4), MatrixRows(matrix, 1, -1)):
        with pytest.raises(ValueError, match="of a matrix of 4 rows of 34 bytes in 2 slots"):
            engine.upload(some_bytes(34), rows)
    with pytest.raises(ValueError, match="35 bytes from row 0"):
        engine.upload(some_bytes(35), MatrixRows(matrix, 0))
    wide = GpuMatrix.allocate("F32", 1, BUFFER, empty=device.empty)
    with pytest.raises(ValueError, match="through buffers of 4096"):
        engine.upload(some_bytes(4 * BUFFER), MatrixRows(wide))


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (FlashError("the drive is gone"), FlashError, "the drive is gone"),
        (OSError("odd"), DeviceError, "a transfer between host memory and GPU failed: odd"),
    ],
)
def test_a_source_that_fails(engine: TransferEngine, error: Exception, kind: type[Exception], told: str) -> None:
    device = engine._device

    def fill(offset: int, memory: NDArray[np.uint8]) -> None:
        if offset >= 2 * BUFFER:
            raise error

    ended: list[Exception | None] = []
    target = device.empty((9 * BUFFER,), torch.uint8)
    failing = engine.upload(fill, target, num_bytes=9 * BUFFER, ended=ended.append)
    good = engine.upload(some_bytes(9 * BUFFER), target)
    assert failing.wait_given() is None
    with pytest.raises(kind, match=told):
        failing.wait()
    assert ended == [failing.error]
    good.wait()
    assert failing.is_done
    assert np.array_equal(target.numpy(), some_bytes(9 * BUFFER))


def test_a_gpu_that_fails_fails_what_is_under_way(device: SimulatedDevice, engine: TransferEngine) -> None:
    class Breaking(GpuMatrix):
        """A matrix that cannot be written."""

        def write(self, slot: int | None, raw: torch.Tensor, first_row: int = 0) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    good = GpuMatrix.allocate("Q8_0", 500, 32, empty=device.empty)
    breaking = Breaking(good.quant_type, good.rows, good.columns, good.planes)
    with pytest.raises(DeviceError, match="failed: an illegal memory access"):
        engine.upload(some_bytes(500 * 34), MatrixRows(breaking)).wait()
    engine.upload(some_bytes(500 * 34), MatrixRows(good)).wait()  # this GPU recovers


def test_a_call_that_fails_after_an_upload(device: SimulatedDevice, engine: TransferEngine) -> None:
    def fail(error: Exception | None) -> None:
        raise RuntimeError("the driver refuses")

    target = device.empty((10,), torch.uint8)
    with pytest.raises(DeviceError, match="the driver refuses"):
        engine.upload(some_bytes(10), target, ended=fail).wait()
    engine.upload(some_bytes(10), target).wait()


@pytest.mark.parametrize("hold_s", [0.0, 0.05])
def test_closing_while_busy(hold_s: float) -> None:
    device = SimulatedDevice(SLOW)
    engine = TransferEngine(device, buffer_bytes=BUFFER)
    begun = threading.Event()

    def fill(offset: int, memory: NDArray[np.uint8]) -> None:
        begun.set()
        time.sleep(hold_s)

    target = device.empty((1000 * BUFFER,), torch.uint8)
    uploads = [engine.upload(fill, target, num_bytes=1000 * BUFFER, priority=priority) for priority in Priority]
    assert begun.wait(5)
    engine.close()
    engine.close()
    device.close()
    for upload in uploads:
        with pytest.raises(DeviceError, match="was closed during a transfer"):
            upload.wait()
    with pytest.raises(DeviceError, match="after the device was closed"):
        engine.upload(fill, target, num_bytes=1000 * BUFFER)


def test_buffers_are_the_gpus_memory_too() -> None:
    device = SimulatedDevice("sim:vram=1MiB,bw=1GB/s,link=1GB/s,tflops=1")
    with TransferEngine(device, buffers=2, buffer_bytes=1 << 17):
        assert device.total_bytes - device.free_bytes == TransferEngine.device_bytes(buffers=2, buffer_bytes=1 << 17)
    with pytest.raises(torch.OutOfMemoryError):
        TransferEngine(device, buffers=2, buffer_bytes=1 << 20)
    device.close()


def test_a_mover_sees_its_chunks(device: SimulatedDevice, engine: TransferEngine) -> None:
    seen: list[tuple[str, int, int]] = []

    class Noting:
        """Writes down what it is asked."""

        def begin(self, offset: int, count: int, buffer: Buffer) -> None:
            seen.append(("begin", offset, count))

        def end(self, offset: int, count: int, buffer: Buffer) -> None:
            seen.append(("end", offset, count))

    asked: list[Exception | None] = []
    engine._up.give(Noting(), 3000, 1000, Priority.DEMAND, asked.append).wait()
    assert seen == [("begin", 0, 3000), ("end", 0, 3000)]
    assert asked == [None]
