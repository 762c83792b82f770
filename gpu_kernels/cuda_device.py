"""A GPU of torch's CUDA interface (NVIDIA's, and AMD's through ROCm): memory, streams, events, calls of host functions.

torch is called from the thread that gives the work, so what a launch raises is raised there; what the GPU itself runs
into later comes out of `synchronize`. Errors are torch's own. Knows nothing of models, files or plans.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu_kernels.device import Copy, CostOf, Event, Launch, Work, check_copy
from gpu_kernels.host_calls import HostLauncher, host_launcher

log = logging.getLogger("strata.gpu")


def _cuda() -> Any:
    """torch.cuda, whose streams and events have no types."""
    return torch.cuda


class CudaEvent:
    """A point in a stream's work."""

    def __init__(self, event: Any) -> None:
        self.event = event

    @property
    def is_done(self) -> bool:
        """Whether the work before it has been done."""
        return bool(self.event.query())

    def synchronize(self) -> None:
        """Returns when the work before it has been done; the thread sleeps until then."""
        self.event.synchronize()


class CudaStream:
    """A stream of the GPU; see `gpu_kernels.device.Stream`."""

    def __init__(self, name: str, stream: Any, call_host: HostLauncher) -> None:
        self.name = name
        self.stream = stream
        self._call_host = call_host
        self._pool: Any = None  # memory that this stream's graphs share: one runs at a time

    def launch(self, call: Callable[[], None], cost: CostOf, name: str = "") -> None:
        """Calls it now, with this as torch's stream: what it does on the GPU happens in the stream's order."""
        with _cuda().stream(self.stream):
            call()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """ValueError where shapes or types differ; the host waits where its side is not pinned."""
        check_copy(target, source)
        with _cuda().stream(self.stream):
            target.copy_(source, non_blocking=True)

    def record(self) -> CudaEvent:
        """The point after everything given so far."""
        event = _cuda().Event(blocking=True)
        event.record(self.stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        """TypeError for an event of another kind of device."""
        if not isinstance(event, CudaEvent):
            raise TypeError(f"{type(event).__name__} is not an event of a CUDA GPU")
        self.stream.wait_event(event.event)

    def call_host(self, address: int, argument: int) -> None:
        """Calls the C function on the driver's thread, which all streams share."""
        self._call_host(self.stream.cuda_stream, address, argument)

    def prepare(self, work: Sequence[Work]) -> Callable[[], None]:
        """Gives one after the other."""

        def give() -> None:
            for each in work:
                if isinstance(each, Launch):
                    self.launch(each.call, each.cost, each.name)
                elif isinstance(each, Copy):
                    self.copy(each.target, each.source)
                else:
                    self.call_host(each.address, each.argument)

        return give

    @property
    def can_capture(self) -> bool:
        """Always: where a graph cannot be made, `capture` tells."""
        return True

    def capture(self, give: Callable[[], None]) -> Callable[[], None]:
        """As a CUDA graph. Its kernels, copies and host calls have the arguments of now, and memory of its own.

        Other threads may use the GPU meanwhile. Source: CUDA programming guide, stream capture.
        """
        graph = _cuda().CUDAGraph()
        if self._pool is None:
            self._pool = _cuda().graph_pool_handle()
        with _cuda().graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            give()

        def replay() -> None:
            with _cuda().stream(self.stream):
                graph.replay()

        return replay

    def synchronize(self) -> None:
        """Returns when all has been done; raises torch's error where the GPU failed."""
        self.stream.synchronize()


class CudaDevice:
    """A GPU; see `gpu_kernels.device.GpuDevice`."""

    is_simulated = False
    host_cpus = None

    def __init__(self, index: int = 0, *, limit_bytes: int | None = None) -> None:
        """Uses at most `limit_bytes` of its memory. NotImplementedError where torch or the driver cannot."""
        if not _cuda().is_available():
            raise NotImplementedError(f"torch {torch.__version__} can use no CUDA or ROCm GPU here")
        if index >= _cuda().device_count():
            raise ValueError(f"there is no GPU {index}: torch sees {_cuda().device_count()}")
        self._call_host = host_launcher(is_hip=torch.version.hip is not None)
        self.torch_device = torch.device("cuda", index)
        self.name = str(_cuda().get_device_name(index))
        self.compute_capability: tuple[int, int] | None = _cuda().get_device_capability(index)
        total_bytes = int(_cuda().mem_get_info(index)[1])
        self.total_bytes = min(limit_bytes or total_bytes, total_bytes)
        if limit_bytes is not None:
            _cuda().set_per_process_memory_fraction(self.total_bytes / total_bytes, index)
        self._streams: list[CudaStream] = []
        self._pins = True

    @property
    def is_pinning(self) -> bool:
        """Whether pinning has not failed."""
        return self._pins

    @property
    def free_bytes(self) -> int:
        """What the system has left and what torch keeps for later, within the limit."""
        index = self.torch_device.index
        allocated = int(_cuda().memory_allocated(index))
        kept = int(_cuda().memory_reserved(index)) - allocated
        return max(min(int(_cuda().mem_get_info(index)[0]) + kept, self.total_bytes - allocated), 0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory with arbitrary contents; torch.OutOfMemoryError where there is not enough."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)

    def free(self, tensor: torch.Tensor) -> None:
        """Empties a tensor; its memory is free when no other one shares it."""
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed host memory; where it cannot be pinned, ordinary memory, and one warning."""
        if self._pins:
            try:
                return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                reason = str(error).partition("\n")[0]
                log.warning("%s: host memory cannot be pinned (%s); copies will make the CPU wait", self.name, reason)
        return torch.zeros(tuple(shape), dtype=dtype)

    def stream(self, name: str) -> CudaStream:
        """A new stream."""
        stream = CudaStream(name, _cuda().Stream(self.torch_device), self._call_host)
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        """Waits for the streams; what a GPU has been given cannot be taken back. Twice is harmless."""
        streams, self._streams = self._streams, []
        for stream in streams:
            try:
                stream.synchronize()
            except RuntimeError as error:
                log.warning("%s: stream %s ended with an error: %s", self.name, stream.name, error)
