"""A simulated GPU: what its text says, its memory, streams in modelled time, and what happens when work fails."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.waiting import Counter
from gpu_kernels.device import CallHost, Copy, Cost, GpuDevice, Launch, Stream
from gpu_kernels.simulated import GRAIN_BYTES, SimulatedDevice
from gpu_kernels.simulated_lanes import chrome_trace, sleep_until
from gpu_kernels.simulated_spec import SimulatedSpec

TEXT = "sim:vram=1MiB,bw=1GB/s,link=0.1GB/s,tflops=0.001,launch=1ms,link_latency=2ms"

LANES = ("gpu", "to_gpu", "from_gpu")


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    simulated = SimulatedDevice(TEXT)
    yield simulated
    simulated.close()


def took(stream: Stream) -> float:
    """Seconds until a stream has done everything."""
    start = time.perf_counter()
    stream.synchronize()
    return time.perf_counter() - start


def nothing() -> None:
    """An operation that costs the host no time."""


class NotOurs:
    """An event of another device."""

    is_done = True

    def synchronize(self) -> None:
        """Nothing to wait for."""


def noted(seen: list[int], number: int) -> Callable[[], None]:
    """An operation that writes down that it was done."""
    return lambda: seen.append(number)


def filled(tensor: torch.Tensor, value: float, after_s: float = 0.0) -> Callable[[], None]:
    """An operation that fills a tensor."""

    def fill() -> None:
        time.sleep(after_s)
        tensor.fill_(value)

    return fill


def test_it_is_a_device(device: SimulatedDevice) -> None:
    gpu: GpuDevice = device
    stream: Stream = gpu.stream("main")
    assert gpu.is_simulated
    assert gpu.name == "simulated GPU (0.000977 GiB, 1 GB/s)"
    assert stream.name == "main"
    assert gpu.torch_device == torch.device("cpu")
    assert gpu.compute_capability is None


def test_a_text() -> None:
    spec = SimulatedSpec.parse("sim:vram=4GiB, bw=192GB/s,link=6GB/s,tflops=6.5")
    assert spec == SimulatedSpec(4 << 30, 192 * 10**9, 6 * 10**9, 65 * 10**11, 5e-6, 10e-6)
    assert spec.text == "sim:vram=4GiB,bw=192GB/s,link=6GB/s,tflops=6.5"
    assert SimulatedSpec.parse(TEXT).text == TEXT.replace("1ms", "1000us").replace("2ms", "2000us")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vram=4GiB", "is no simulated GPU"),
        ("sim:", "'' in 'sim:' is none of vram=, bw="),
        ("sim:vram=4GiB,bw=1GB/s,link=1GB/s", "tflops= is missing"),
        ("sim:vram=4GiB,speed=3,bw=1GB/s,link=1GB/s,tflops=1", "'speed=3' in"),
        ("sim:vram=4GiB,vram=4GiB,bw=1GB/s,link=1GB/s,tflops=1", "vram= is given twice"),
        ("sim:vram=4,bw=1GB/s,link=1GB/s,tflops=1", "vram='4' needs a unit"),
        ("sim:vram=fourGiB,bw=1GB/s,link=1GB/s,tflops=1", "vram='fourGiB' is not a number"),
        ("sim:vram=4GiB,bw=0GB/s,link=1GB/s,tflops=1", "bw='0GB/s' is out of range"),
        ("sim:vram=4GiB,bw=1GB/s,link=nanGB/s,tflops=1", "link='nanGB/s' is out of range"),
        ("sim:vram=4GiB,bw=1GB/s,link=1GB/s,tflops=inf", "tflops='inf' is out of range"),
        ("sim:vram=-4GiB,bw=1GB/s,link=1GB/s,tflops=1", "vram='-4GiB' is out of range"),
        ("sim:vram=4GiB,bw=1GB/s,link=1GB/s,tflops=1,launch=-1us", "launch='-1us' is out of range"),
    ],
)
def test_a_text_that_is_wrong(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SimulatedSpec.parse(text)


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        SimulatedSpec,
        st.integers(1, 1 << 50),
        st.integers(1, 10**13),
        st.integers(1, 10**12),
        st.integers(10**6, 10**15).map(lambda megaflops: megaflops - megaflops % 10**6),
        st.integers(0, 10**6).map(lambda nanoseconds: round(nanoseconds * 1e-9, 12)),
        st.integers(0, 10**6).map(lambda nanoseconds: round(nanoseconds * 1e-9, 12)),
    )
)
def test_every_spec_has_a_text(spec: SimulatedSpec) -> None:
    assert SimulatedSpec.parse(spec.text) == spec


def test_memory_is_limited_and_comes_back(device: SimulatedDevice) -> None:
    assert device.free_bytes == device.total_bytes == 1 << 20
    first = device.empty((3, 100), torch.float32)
    assert first.shape == (3, 100)
    assert first.data_ptr() % 64 == 0
    assert device.free_bytes == (1 << 20) - 3 * GRAIN_BYTES
    view = first[1:]
    with pytest.raises(torch.OutOfMemoryError, match=r"simulated GPU .* out of memory: 1048576 bytes"):
        device.empty((1 << 20,), torch.uint8)
    del first
    gc.collect()
    assert device.free_bytes == (1 << 20) - 3 * GRAIN_BYTES  # the view shares it
    del view
    gc.collect()
    assert device.free_bytes == 1 << 20
    device.empty((1 << 19,), torch.bfloat16)
    other = device.empty((1 << 20,), torch.uint8)
    device.free(other)
    assert other.numel() == 0
    assert device.free_bytes == 1 << 20
    assert device.empty((0, 4), torch.float16).shape == (0, 4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=40))
def test_memory_is_counted_by_whatever_lives(sizes: list[tuple[int, bool]]) -> None:
    device, living = SimulatedDevice(TEXT), list[torch.Tensor]()
    for size, is_kept in sizes:
        tensor = device.empty((size,), torch.int16)
        if is_kept:
            living.append(tensor)
        del tensor
    used = sum(-(-2 * tensor.numel() // GRAIN_BYTES) * GRAIN_BYTES for tensor in living)
    assert device.free_bytes == device.total_bytes - used


def test_kernels_take_what_they_cost(device: SimulatedDevice) -> None:
    stream = device.stream("main")
    stream.launch(nothing, Cost(num_bytes=20_000_000), "read")  # 20 ms and 1 ms
    stream.launch(nothing, Cost(num_bytes=1, flops=10_000_000), "compute")  # 10 ms and 1 ms
    assert took(stream) > 0.030
    gpu, to_gpu, from_gpu = device.lanes()
    assert gpu.busy_s == pytest.approx(0.032)
    assert [task.name for task in gpu.tasks] == ["read", "compute"]
    assert gpu.tasks[1].start_s >= gpu.tasks[0].end_s
    assert gpu.worked_s > 0
    assert to_gpu.busy_s == from_gpu.busy_s == 0
    device.reset_lanes()
    assert device.lanes()[0].busy_s == 0


def test_a_cost_may_be_known_late(device: SimulatedDevice) -> None:
    stream, size = device.stream("main"), [0]
    stream.launch(lambda: size.append(7_000_000), Cost())
    stream.launch(nothing, lambda: Cost(num_bytes=size[-1]))
    stream.synchronize()
    assert device.lanes()[0].busy_s == pytest.approx(0.009)
    stream.launch(nothing, lambda: Cost(num_bytes=size[9]))
    with pytest.raises(IndexError):
        stream.synchronize()


def test_kernels_of_two_streams_share_the_gpu(device: SimulatedDevice) -> None:
    streams = [device.stream(name) for name in ("one", "two")]
    for stream in streams:
        stream.launch(nothing, Cost(num_bytes=15_000_000))
    assert sum(took(stream) for stream in streams) > 0.031


def test_copies_take_the_link_each_direction_its_own(device: SimulatedDevice) -> None:
    there, back = device.stream("there"), device.stream("back")
    on_gpu, other = (device.empty((100_000,), torch.float32) for _ in range(2))
    host = device.pinned((100_000,), torch.float32)
    there.copy(on_gpu, host)  # 4 ms and 2 ms
    there.copy(on_gpu[:50_000], host[50_000:])  # 2 ms and 2 ms
    back.copy(host, other)
    there.synchronize()
    back.synchronize()
    gpu, to_gpu, from_gpu = device.lanes()
    assert (gpu.busy_s, to_gpu.busy_s, from_gpu.busy_s) == pytest.approx((0, 0.010, 0.006))
    there.copy(other, on_gpu)
    there.synchronize()
    assert device.lanes()[0].busy_s == pytest.approx(0.0018)


def test_copies_hide_behind_kernels(device: SimulatedDevice) -> None:
    compute, copies = device.stream("compute"), device.stream("copies")
    on_gpu, host = device.empty((10_000,), torch.uint8), device.pinned((10_000,), torch.uint8)
    for _ in range(5):
        compute.launch(nothing, Cost(num_bytes=9_000_000))
        copies.copy(on_gpu, host)
    for stream in (compute, copies):
        stream.synchronize()
    gpu, to_gpu, _ = device.lanes()
    first, last = to_gpu.tasks[0], gpu.tasks[-1]
    assert gpu.busy_s == pytest.approx(0.050)
    assert to_gpu.busy_s == pytest.approx(0.0105)
    assert to_gpu.tasks[-1].end_s < last.end_s
    assert max(last.end_s, to_gpu.tasks[-1].end_s) - min(first.start_s, gpu.tasks[0].start_s) < gpu.busy_s + 0.005


def test_work_is_done_in_order_and_in_another_thread(device: SimulatedDevice) -> None:
    stream, seen, threads = device.stream("main"), list[int](), list[int]()
    for number in range(50):
        stream.launch(noted(seen, number), Cost())
        stream.launch(lambda: threads.append(threading.get_ident()), Cost())
    stream.synchronize()
    assert seen == list(range(50))
    assert len(set(threads) - {threading.get_ident()}) == 1


def test_events_order_streams(device: SimulatedDevice) -> None:
    first, second = device.stream("first"), device.stream("second")
    value = device.empty((4,), torch.float32)
    result = device.pinned((4,), torch.float32)
    first.launch(filled(value, 7.0, after_s=0.02), Cost(num_bytes=5_000_000))
    event = first.record()
    assert not event.is_done
    second.wait(event)
    second.copy(result, value)
    second.synchronize()
    assert result.tolist() == [7.0] * 4
    event.synchronize()
    gpu, _, from_gpu = device.lanes()
    assert from_gpu.tasks[0].start_s >= gpu.tasks[0].end_s
    with pytest.raises(TypeError, match="is not an event of a simulated GPU"):
        second.wait(NotOurs())


def test_events_are_not_done_before_their_modelled_time(device: SimulatedDevice) -> None:
    stream = device.stream("main")
    start = time.perf_counter()
    stream.launch(nothing, Cost(num_bytes=30_000_000))
    event = stream.record()
    while not event.is_done:
        time.sleep(0.001)
    assert time.perf_counter() - start >= 0.031


def test_host_functions_hand_over_both_ways(device: SimulatedDevice) -> None:
    stream, ready, done = device.stream("main"), Counter(), Counter()
    wait, signal = ready.wait_call(), done.raise_call()
    value = device.empty((1,), torch.float32)
    for step in range(1, 6):
        wait.value, signal.value = step, 2
        stream.call_host(wait.address, wait.argument)
        stream.launch(filled(value, step), Cost())
        stream.call_host(signal.address, signal.argument)
        assert done.value == 2 * (step - 1)
        ready.add()
        done.wait(2 * step)
        assert value.item() == step
    stream.synchronize()


def test_prepared_work_is_done_in_order_as_often_as_it_is_given(device: SimulatedDevice) -> None:
    stream, done = device.stream("main"), Counter()
    signal = done.raise_call()
    here, there = device.empty((4,), torch.float32), device.pinned((4,), torch.float32)
    seen: list[float] = []
    give = stream.prepare(
        [
            Launch(lambda: seen.append(here[0].item()), lambda: Cost(num_bytes=1_000_000), "look"),
            Copy(here, there),
            Launch(nothing, Cost()),
            CallHost(signal.address, signal.argument),
        ]
    )
    here.zero_()
    for number in (1.0, 2.0):
        there.fill_(number)
        give()
        done.wait(int(number))
        stream.synchronize()
    assert seen == [0.0, 1.0]
    assert here.tolist() == [2.0] * 4
    gpu, to_gpu, _ = device.lanes()
    assert [task.name for task in gpu.tasks] == ["look", "", "look", ""]
    assert len(to_gpu.tasks) == 2
    with pytest.raises(ValueError, match="cannot be copied"):
        stream.prepare([Copy(here, device.pinned((5,), torch.float32))])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be kept to CPUs here")
def test_its_threads_leave_cpus_to_the_host(device: SimulatedDevice) -> None:
    cpus: list[set[int]] = []
    stream = device.stream("main")
    stream.launch(lambda: cpus.append(os.sched_getaffinity(0)), Cost())
    stream.synchronize()
    allowed = os.sched_getaffinity(0)
    if device.host_cpus is None:
        assert len(allowed) == 1
    else:
        assert device.host_cpus | cpus[0] == allowed
        assert not device.host_cpus & cpus[0]


def test_a_host_function_is_called_at_the_modelled_time(device: SimulatedDevice) -> None:
    stream, done = device.stream("main"), Counter()
    signal = done.raise_call()
    start = time.perf_counter()
    stream.launch(nothing, Cost(num_bytes=20_000_000))
    stream.call_host(signal.address, signal.argument)
    done.wait(1)
    assert time.perf_counter() - start >= 0.021


def test_what_a_launch_raises_comes_out_once_and_ends_the_rest(device: SimulatedDevice) -> None:
    stream, done, seen = device.stream("main"), Counter(), list[int]()
    signal = done.raise_call()

    def fail() -> None:
        raise torch.OutOfMemoryError("no more")

    stream.launch(fail, Cost())
    stream.launch(noted(seen, 1), Cost())
    stream.call_host(signal.address, signal.argument)  # or the CPU would wait for ever
    event = stream.record()
    done.wait(1)
    for wait in (event.synchronize, stream.synchronize):
        with pytest.raises(torch.OutOfMemoryError, match="no more"):
            wait()
    assert seen == []
    stream.launch(noted(seen, 2), Cost())
    stream.synchronize()
    assert seen == [2]


def test_a_copy_of_the_wrong_size_or_type(device: SimulatedDevice) -> None:
    stream = device.stream("main")
    target = device.empty((4,), torch.float32)
    with pytest.raises(ValueError, match=r"torch.float32 \(5,\) cannot be copied to torch.float32 \(4,\)"):
        stream.copy(target, device.pinned((5,), torch.float32))
    with pytest.raises(ValueError, match="cannot be copied"):
        stream.copy(target, device.pinned((4,), torch.float16))


def test_closing_while_busy() -> None:
    device, seen = SimulatedDevice(TEXT), list[int]()
    stream, begun, counter = device.stream("main"), threading.Event(), Counter()
    signal = counter.raise_call()
    stream.launch(begun.set, Cost())
    stream.launch(filled(torch.empty(1), 0.0, after_s=0.05), Cost())
    for _ in range(20):
        stream.launch(noted(seen, 1), Cost(num_bytes=1_000_000_000))
    stream.call_host(signal.address, signal.argument)
    event = stream.record()
    assert begun.wait(5)
    device.close()
    assert event.is_done
    assert counter.value == 1
    assert seen == []
    device.close()
    with pytest.raises(ValueError, match="stream main was closed"):
        stream.launch(nothing, Cost())


def test_closing_while_a_host_function_hangs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("gpu_kernels.simulated_stream.CLOSE_S", 0.05)
    device, counter = SimulatedDevice(TEXT), Counter()
    stream, wait = device.stream("main"), counter.wait_call(1)
    stream.call_host(wait.address, wait.argument)
    event = stream.record()
    device.close()
    assert "a host function on stream main of the simulated GPU does not return" in caplog.text
    counter.fail(3)  # who fails while a stream waits must say so
    event.synchronize()
    assert wait.error == 3


def test_a_trace_of_the_lanes(device: SimulatedDevice) -> None:
    stream = device.stream("main")
    stream.launch(nothing, Cost(num_bytes=2_000_000), "first")
    stream.launch(nothing, Cost())
    stream.synchronize()
    events = chrome_trace(device.lanes())
    assert [event["args"] for event in events[:3]] == [{"name": f"simulated {name}"} for name in LANES]
    first, second = events[3:]
    assert (first["name"], first["ts"], second["name"]) == ("first", 0.0, "gpu")
    assert first["dur"] == pytest.approx(3000)
    assert second["dur"] == pytest.approx(1000)
    assert chrome_trace([]) == []


def test_sleeping_never_ends_early() -> None:
    for seconds in (-1.0, 0.0, 1e-5, 3e-4, 2e-3):
        moment = time.perf_counter() + seconds
        sleep_until(moment)
        assert time.perf_counter() >= moment
