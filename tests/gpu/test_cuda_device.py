"""A real GPU through the device's interface: memory, order, events, host functions both ways, transfers, overlap."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from cpu_kernels.waiting import Counter
from gpu_kernels.cuda_device import CudaDevice
from gpu_kernels.device import CallHost, Copy, Cost, Launch
from gpu_kernels.matrix import GpuMatrix, arrange
from gpu_kernels.simulated import SimulatedDevice
from offload.transfer import MatrixRows, TransferEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no CUDA or ROCm GPU here"),
]

MIB = 1 << 20


def filled(tensor: torch.Tensor, value: float) -> Callable[[], None]:
    """An operation that fills a tensor."""

    def fill() -> None:
        tensor.fill_(value)

    return fill


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    gpu = CudaDevice()
    yield gpu
    gpu.close()


def test_memory_is_limited(device: CudaDevice) -> None:
    limited = CudaDevice(limit_bytes=device.free_bytes // 2)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            limited.empty((limited.total_bytes + MIB,), torch.uint8)
        before = limited.free_bytes
        tensor = limited.empty((64 * MIB,), torch.uint8)
        assert before - limited.free_bytes >= 64 * MIB
        limited.free(tensor)
        assert limited.free_bytes >= before - MIB
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_repeated_work_as_a_graph(device: CudaDevice) -> None:
    """Kernels, copies and calls of host functions, which see what lies there when they run."""
    stream, raised = device.stream("steps"), Counter()
    source, result = device.pinned((MIB,), torch.float32), device.pinned((MIB,), torch.float32)
    here, call = device.empty((MIB,), torch.float32), raised.raise_call()
    work = [
        Copy(here, source),
        Launch(lambda: torch.add(here, here.sum() * 0 + 1, out=here), Cost()),
        Copy(result, here),
        CallHost(call.address, call.argument),
    ]
    give = stream.prepare(work)
    give()
    stream.synchronize()
    raised.wait(1)
    replay = stream.capture(give)
    for step in range(2, 6):
        source.fill_(step)
        replay()
        stream.synchronize()
        raised.wait(step)
        assert (result == step + 1).all()


def test_work_copies_and_events_keep_their_order(device: CudaDevice) -> None:
    first, second = device.stream("first"), device.stream("second")
    value = device.empty((MIB,), torch.float32)
    host = device.pinned((MIB,), torch.float32)
    assert host.is_pinned()
    for step in range(20):
        first.launch(filled(value, step), Cost())
        second.wait(first.record())
        second.copy(host, value)
        event = second.record()
        first.wait(event)
        event.synchronize()
        assert event.is_done
        assert (host == step).all()
    first.synchronize()


def test_host_functions_hand_over_both_ways(device: CudaDevice) -> None:
    stream, ready, done = device.stream("main"), Counter(), Counter()
    wait, signal = ready.wait_call(), done.raise_call()
    host, value = device.pinned((1,), torch.float32), device.empty((1,), torch.float32)
    seconds = []
    for step in range(1, 101):
        wait.value = step
        stream.call_host(wait.address, wait.argument)
        stream.launch(filled(value, step), Cost())
        stream.copy(host, value)
        stream.call_host(signal.address, signal.argument)
        assert done.value == step - 1
        start = time.perf_counter()
        ready.add()
        done.wait(step)
        seconds.append(time.perf_counter() - start)
        assert host.item() == step
        stream.synchronize()
    print(f"hand-over to the GPU and back: {1e6 * float(np.median(seconds)):.1f} us")  # noqa: T201 - a measurement


def test_uploads_and_downloads(device: CudaDevice) -> None:
    data = np.random.default_rng(0).integers(0, 256, 9 * MIB + 5, np.uint8)
    back = np.zeros_like(data)
    with TransferEngine(device) as engine:
        target = device.empty((len(data),), torch.uint8)
        engine.upload(data, target).wait()
        engine.download(target, back).wait()
        assert np.array_equal(back, data)
        raw = data[: 4096 * 34 * 8].reshape(4096, -1)
        matrix = GpuMatrix.allocate("Q8_0", 4096, 256, slots=3, empty=device.empty)
        engine.upload(raw, MatrixRows(matrix, 1)).wait()
        expected = arrange(torch.from_numpy(raw), "Q8_0")
        for plane, wanted in zip(matrix.slot(1).planes, expected.planes, strict=True):
            assert torch.equal(plane.cpu().view(torch.uint8), wanted.view(torch.uint8))
        big = np.zeros(256 * MIB, np.uint8)
        engine.upload(big, device.empty((len(big),), torch.uint8)).wait()
        print(f"uploads: {engine.upload_bytes_per_s / 1e9:.1f} GB/s")  # noqa: T201 - a measurement


def test_uploads_happen_beside_kernels(device: CudaDevice) -> None:
    stream = device.stream("compute")
    matrix = device.empty((4096, 4096), torch.float32)
    matrix.zero_()
    product = torch.empty_like(matrix)
    data = np.zeros(128 * MIB, np.uint8)
    target = device.empty((len(data),), torch.uint8)

    def multiply() -> None:
        torch.mm(matrix, matrix, out=product)

    def compute() -> None:
        for _ in range(200):
            stream.launch(multiply, Cost())

    with TransferEngine(device) as engine:
        compute()
        stream.synchronize()
        start = time.perf_counter()
        compute()
        stream.synchronize()
        alone_s = time.perf_counter() - start
        start = time.perf_counter()
        engine.upload(data, target).wait()
        upload_s = time.perf_counter() - start
        start = time.perf_counter()
        compute()
        engine.upload(data, target).wait()
        stream.synchronize()
        both_s = time.perf_counter() - start
    print(f"kernels {alone_s:.3f} s, uploads {upload_s:.3f} s, together {both_s:.3f} s")  # noqa: T201 - a measurement
    assert both_s < alone_s + upload_s


def test_an_event_of_another_device(device: CudaDevice) -> None:
    simulated = SimulatedDevice("sim:vram=1MiB,bw=1GB/s,link=1GB/s,tflops=1")
    with pytest.raises(TypeError):
        device.stream("main").wait(simulated.stream("other").record())
    simulated.close()
