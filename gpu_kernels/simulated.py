"""A GPU that is not there: the CPU does its work, behind the memory, bandwidths and times of a given GPU.

The same calls as for a real one (`gpu_kernels.device`), so that plans, caches, overlap and faults can be tried
anywhere. Tensors that `empty` made are the GPU's memory; every other tensor is the host's, and copies between the two
take the link. Kernels of all streams share the GPU, copies of all streams share the link, each direction its own.

The streams' threads have a CPU of their own where there are two or more, so that the simulated GPU computes beside the
CPU and not instead of it: who is woken by a thread would else take that thread's place.
"""

import math
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from gpu_kernels.device import Cost
from gpu_kernels.simulated_lanes import Lane, LaneTimes, sleep_precisely
from gpu_kernels.simulated_spec import SimulatedSpec
from gpu_kernels.simulated_stream import SimulatedStream

GRAIN_BYTES = 512  # as torch's allocator of CUDA memory counts
SWITCH_S = 1e-4  # after which a thread that plays the GPU gets Python's lock; 5 ms as a rule
_LINE_BYTES = 64


class SimulatedDevice:
    """A simulated GPU; see `gpu_kernels.device.GpuDevice`."""

    is_simulated = True
    compute_capability = None

    def __init__(self, spec: SimulatedSpec | str, *, limit_bytes: int | None = None) -> None:
        """Uses at most `limit_bytes` of its memory. ValueError for a text that `SimulatedSpec.parse` does not read."""
        self.spec = SimulatedSpec.parse(spec) if isinstance(spec, str) else spec
        self.total_bytes = min(limit_bytes or self.spec.vram_bytes, self.spec.vram_bytes)
        self.torch_device = torch.device("cpu")
        self._gpu, self._to, self._from = Lane("gpu"), Lane("to_gpu"), Lane("from_gpu")
        self._streams: list[SimulatedStream] = []
        self._lock = threading.Lock()
        self.host_lock = threading.Lock()
        self._used_bytes = self.peak_bytes = 0
        self._owned: set[int] = set()  # addresses of its memory
        self._gone: deque[tuple[int, int]] = deque()  # address and bytes of memory that nobody uses any more
        self._torch_threads, self._switch_s = torch.get_num_threads(), sys.getswitchinterval()
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._own_cpus = frozenset(cpus[-1:]) if len(cpus) > 1 else None
        self.host_cpus = frozenset(cpus[:-1]) or None

    @property
    def name(self) -> str:
        """With its memory and bandwidth."""
        spec = self.spec
        return f"simulated GPU ({spec.vram_bytes / 2**30:.3g} GiB, {spec.bytes_per_s / 1e9:.3g} GB/s)"

    @property
    def free_bytes(self) -> int:
        """What is left of it."""
        with self._lock:
            self._collect()
            return self.total_bytes - self._used_bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that counts until nothing shares it any more; torch.OutOfMemoryError beyond the limit."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        counted = -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES
        if counted > self.free_bytes:
            raise self._full(counted)
        memory = np.empty(num_bytes + _LINE_BYTES, np.uint8)
        start = -memory.ctypes.data % _LINE_BYTES
        address = memory.ctypes.data + start
        with self._lock:
            self._collect()  # after the memory was had: whoever had this address before is among those that are gone
            if counted > self.total_bytes - self._used_bytes:
                raise self._full(counted)
            self._used_bytes += counted
            self.peak_bytes = max(self.peak_bytes, self._used_bytes)
            self._owned.add(address)
        weakref.finalize(memory, self._gone.append, (address, counted)).atexit = False
        storage = torch.from_numpy(memory[start : start + num_bytes]).untyped_storage()
        strides = torch.empty(tuple(shape), dtype=dtype, device="meta").stride()
        # not a view: those hold the tensor that they are of, and with it the memory, beyond `free`
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), strides)

    def free(self, tensor: torch.Tensor) -> None:
        """Empties a tensor; its memory is free when no other one shares it."""
        tensor.data = torch.empty(0, dtype=tensor.dtype)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed host memory; all of it is as good as pinned."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def stream(self, name: str) -> SimulatedStream:
        """A new stream, which is a thread."""
        stream = SimulatedStream(name, self)
        self._streams.append(stream)
        return stream

    def lanes(self) -> tuple[LaneTimes, ...]:
        """What its cores and memory, and the link's two directions, did since the last `reset_lanes`."""
        return self._gpu.times(), self._to.times(), self._from.times()

    def reset_lanes(self) -> None:
        """Forgets what was done."""
        for lane in (self._gpu, self._to, self._from):
            lane.reset()

    def close(self) -> None:
        """Leaves out what has not begun, except host functions and events, and ends the streams; twice is harmless."""
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.begin_close()
        for stream in streams:
            stream.end_close()
        if streams:
            torch.set_num_threads(self._torch_threads)
            sys.setswitchinterval(self._switch_s)

    def kernel_lane(self, cost: Cost) -> tuple[Lane, float]:
        """The GPU, and how long a kernel of this cost takes."""
        spec = self.spec
        return self._gpu, spec.launch_s + max(cost.num_bytes / spec.bytes_per_s, cost.flops / spec.flops_per_s)

    def copy_lane(self, target: torch.Tensor, source: torch.Tensor) -> tuple[Lane, float]:
        """The link where exactly one side is the GPU's memory, else the GPU, which reads and writes."""
        is_to, is_from = self._owns(target), self._owns(source)
        num_bytes = target.numel() * target.element_size()
        if is_to == is_from:
            return self.kernel_lane(Cost(2 * num_bytes))
        seconds = self.spec.link_latency_s + num_bytes / self.spec.link_bytes_per_s
        return (self._to if is_to else self._from), seconds

    def begin_thread(self) -> None:
        """A stream's thread has one core: the others are the CPU's part of the work."""
        if self._own_cpus is not None:
            os.sched_setaffinity(0, self._own_cpus)
        torch.set_num_threads(1)
        sys.setswitchinterval(SWITCH_S)
        sleep_precisely()

    def _owns(self, tensor: torch.Tensor) -> bool:
        with self._lock:
            self._collect()
            return tensor.untyped_storage().data_ptr() in self._owned

    def _collect(self) -> None:
        """Takes back what nobody uses any more."""
        while self._gone:
            address, num_bytes = self._gone.popleft()
            self._owned.discard(address)
            self._used_bytes -= num_bytes

    def _full(self, num_bytes: int) -> torch.OutOfMemoryError:
        free = self.total_bytes - self._used_bytes
        return torch.OutOfMemoryError(
            f"{self.name} out of memory: {num_bytes} bytes were asked for, {free} of {self.total_bytes} are free"
        )
