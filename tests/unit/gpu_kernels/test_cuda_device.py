"""What a CUDA device asks of torch and of the driver, with doubles for both, and what it says where they fail."""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_kernels import cuda_device, host_calls
from gpu_kernels.cuda_device import CudaDevice
from gpu_kernels.device import CallHost, Cost, GpuDevice, Launch
from gpu_kernels.devices import open_device
from gpu_kernels.simulated import SimulatedDevice

TOTAL = 8 << 30


class FakeStream:
    """A stream that writes down what is asked of it."""

    cuda_stream = 77

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.error: Exception | None = None

    def wait_event(self, event: Any) -> None:
        self.calls.append(("wait", event))

    def synchronize(self) -> None:
        self.calls.append("synchronize")
        if self.error is not None:
            raise self.error


class FakeEvent:
    """An event that is done."""

    def __init__(self, *, blocking: bool) -> None:
        assert blocking, "a thread that waits must not spin"

    def record(self, stream: FakeStream) -> None:
        stream.calls.append("record")

    def query(self) -> int:
        return 1

    def synchronize(self) -> None:
        """Done."""


class FakeCuda:
    """As much of torch.cuda as a device needs."""

    Event = FakeEvent

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fraction = 1.0

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def get_device_name(self, index: int) -> str:
        return f"Card {index}"

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return 7, 5

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 3 << 30, TOTAL

    def memory_allocated(self, index: int) -> int:
        return 1 << 30

    def memory_reserved(self, index: int) -> int:
        return 2 << 30

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        self.fraction = fraction

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802 - torch's name
        return FakeStream(self.calls)

    @contextmanager
    def stream(self, stream: FakeStream) -> Any:
        self.calls.append("enter")
        yield
        self.calls.append("exit")

    def CUDAGraph(self) -> Any:  # noqa: N802 - torch's name
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def graph_pool_handle(self) -> str:
        self.calls.append("pool")
        return "pool of graphs"

    @contextmanager
    def graph(self, graph: Any, *, pool: str, stream: FakeStream, capture_error_mode: str) -> Any:
        self.calls.append(("capture", pool, stream, capture_error_mode))
        yield
        self.calls.append("captured")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    launched = lambda stream, address, argument: fake.calls.append((stream, address, argument))  # noqa: E731
    monkeypatch.setattr(cuda_device, "host_launcher", lambda *, is_hip: launched)
    return fake


def test_what_it_is(cuda: FakeCuda) -> None:
    device: GpuDevice = CudaDevice()
    assert not device.is_simulated
    assert (device.name, device.compute_capability, device.total_bytes) == ("Card 0", (7, 5), TOTAL)
    assert device.torch_device == torch.device("cuda:0")
    assert device.free_bytes == 4 << 30  # 3 GiB are free, and one of the two that torch has taken
    assert cuda.fraction == 1.0


def test_a_limit(cuda: FakeCuda) -> None:
    device = CudaDevice(limit_bytes=4 << 30)
    assert device.total_bytes == 4 << 30
    assert device.free_bytes == 3 << 30
    assert cuda.fraction == 0.5
    assert CudaDevice(limit_bytes=TOTAL + 1).total_bytes == TOTAL


def test_a_stream_gives_torch_its_work_in_order(cuda: FakeCuda) -> None:
    device = CudaDevice()
    stream = device.stream("main")
    target, source = torch.zeros(3), torch.ones(3)
    stream.launch(lambda: cuda.calls.append("call"), Cost())
    stream.copy(target, source)
    event = stream.record()
    stream.wait(event)
    stream.call_host(1234, 5678)
    stream.synchronize()
    assert cuda.calls == [
        *("enter", "call", "exit", "enter", "exit", "record"),
        *(("wait", event.event), (77, 1234, 5678), "synchronize"),
    ]
    assert target.tolist() == [1.0] * 3
    assert event.is_done
    event.synchronize()
    with pytest.raises(ValueError, match="cannot be copied"):
        stream.copy(target, torch.ones(4))
    simulated = SimulatedDevice("sim:vram=1MiB,bw=1GB/s,link=1GB/s,tflops=1")
    with pytest.raises(TypeError, match="SimulatedEvent is not an event of a CUDA GPU"):
        stream.wait(simulated.stream("other").record())
    simulated.close()


def test_repeated_work_is_captured_as_a_graph(cuda: FakeCuda) -> None:
    """Other threads may use the GPU while it is; graphs of a stream share memory."""
    stream = CudaDevice().stream("main")
    assert stream.can_capture
    give = stream.prepare([Launch(lambda: cuda.calls.append("call"), Cost()), CallHost(12, 34)])
    replay = stream.capture(give)
    work = ["enter", "call", "exit", (77, 12, 34)]
    began = ("capture", "pool of graphs", stream.stream, "thread_local")
    assert cuda.calls == ["pool", began, *work, "captured"]
    cuda.calls.clear()
    replay()
    assert cuda.calls == ["enter", "replay", "exit"]
    cuda.calls.clear()
    stream.capture(give)
    assert cuda.calls == [began, *work, "captured"]


def test_what_a_launch_raises_is_raised_at_once(cuda: FakeCuda) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaDevice().stream("main").launch(fail, Cost())


def test_pinning_that_fails_is_told_once(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = torch.zeros

    def no_pinning(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand much more")
        return zeros(*args, **options)

    monkeypatch.setattr(torch, "zeros", no_pinning)
    device = CudaDevice()
    for _ in range(2):
        assert device.pinned((2, 3), torch.float16).shape == (2, 3)
    assert not device.is_pinning
    warning = "Card 0: host memory cannot be pinned (CUDA error: out of memory); copies will make the CPU wait"
    assert caplog.messages == [warning]


def test_closing_waits_and_tells_errors(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    device = CudaDevice()
    device.stream("good")
    device.stream("bad").stream.error = RuntimeError("an illegal memory access was encountered")
    device.close()
    device.close()
    assert cuda.calls == ["synchronize", "synchronize"]
    assert caplog.messages == ["Card 0: stream bad ended with an error: an illegal memory access was encountered"]


def test_devices_by_name(cuda: FakeCuda) -> None:
    assert open_device("cuda:0").name == "Card 0"
    assert open_device("cuda", limit_bytes=1 << 30).total_bytes == 1 << 30
    simulated = open_device("sim:vram=2GiB,bw=1GB/s,link=1GB/s,tflops=1", limit_bytes=1 << 20)
    assert simulated.is_simulated
    assert simulated.free_bytes == 1 << 20
    with pytest.raises(ValueError, match="there is no GPU 3: torch sees 1"):
        open_device("cuda:3")
    with pytest.raises(ValueError, match="'cuda:x' is no GPU"):
        open_device("cuda:x")
    with pytest.raises(NotImplementedError, match="mps: only CUDA and ROCm GPUs"):
        open_device("mps")


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotImplementedError, match="can use no CUDA or ROCm GPU here"):
        CudaDevice()


def test_the_driver_is_called_with_stream_function_and_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    codes = iter([0, 719])
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

    def driver(stream: int, address: int, argument: int) -> int:
        seen.append((stream, address, argument))
        return next(codes)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuLaunchHostFunc=kind(driver)))
    launch = host_calls.host_launcher()
    launch(7, 8, 9)
    assert seen == [(7, 8, 9)]
    with pytest.raises(RuntimeError, match="cuLaunchHostFunc failed with code 719"):
        launch(7, 8, 9)
    with pytest.raises(NotImplementedError, match="need hipLaunchHostFunc of"):
        host_calls.host_launcher(is_hip=True)


def test_a_machine_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_calls, "_NVIDIA", ("libnothing-of-the-kind.so", "cuLaunchHostFunc"))
    with pytest.raises(NotImplementedError, match=r"need cuLaunchHostFunc of libnothing-of-the-kind\.so"):
        host_calls.host_launcher()
