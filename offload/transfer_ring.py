"""One direction of the way between host memory and a GPU: a thread that moves chunks through a ring of pinned buffers.

The most urgent request goes first, chunk by chunk, so that an urgent one waits for the few chunks that are under way
and for no more. Knows nothing about what is moved: a `Mover` begins a chunk on the ring's stream and ends it when the
GPU is done with the buffer. Invariant: every request ends, with its bytes there or with an error; what can still fail
after that fails elsewhere.
"""

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from gpu_kernels.device import Event, GpuDevice
from offload.errors import DeviceError, StrataError
from offload.flash import Priority

Ended = Callable[[StrataError | None], None]
"""Called with the error, if there was one, on the ring's thread when a transfer has ended; must be quick."""

UNDER_WAY = 2  # chunks of requests that are not urgent: one is filled while the other one is copied


@dataclass(frozen=True, slots=True)
class Buffer:
    """A place of the ring: pinned memory of the host, and as much of the GPU's; both (n,) uint8."""

    host: torch.Tensor
    staged: torch.Tensor


class Mover(Protocol):
    """How a request's bytes move."""

    def begin(self, offset: int, count: int, buffer: Buffer) -> None:
        """Gives the ring's stream what moves `count` bytes from byte `offset` on through the buffer."""
        ...

    def end(self, offset: int, count: int, buffer: Buffer) -> None:
        """When that has been done."""
        ...


class Transfer:
    """Bytes on their way."""

    def __init__(self, num_bytes: int, ended: Ended | None) -> None:
        self.num_bytes = num_bytes
        self._ended = ended
        self._error: StrataError | None = None
        self._given = threading.Event()
        self._done = threading.Event()
        self._event: Event | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    @property
    def error(self) -> StrataError | None:
        """Why it failed, once it is done."""
        return self._error

    def wait_given(self) -> Event | None:
        """Returns when the source is needed no more, with the event after which the bytes are there; None if failed."""
        self._given.wait()
        return self._event

    def join(self) -> None:
        """Returns when it has ended, well or not."""
        self._done.wait()

    def wait(self) -> None:
        """Returns when the bytes are there; raises why they will not be."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def was_given(self, event: Event | None, error: StrataError | None) -> None:
        """The ring gave its last chunk to the stream, or gave it up."""
        self._event, self._error = event, error
        self._given.set()

    def was_done(self, error: StrataError | None) -> None:
        """The ring is done with it."""
        self._error = error
        if self._ended is not None:
            try:
                self._ended(error)
            except Exception as failure:  # noqa: BLE001 - told by `wait`
                self._error = error or _told(failure)
        self._done.set()


@dataclass(order=True, slots=True)
class _Request:
    priority: Priority
    number: int
    transfer: Transfer = field(compare=False)
    mover: Mover = field(compare=False)
    chunk_bytes: int = field(compare=False)
    begun: int = field(default=0, compare=False)  # bytes
    under_way: int = field(default=0, compare=False)  # chunks
    error: StrataError | None = field(default=None, compare=False)

    @property
    def is_given(self) -> bool:
        return self.error is not None or self.begun == self.transfer.num_bytes


@dataclass(frozen=True, slots=True)
class _Chunk:
    request: _Request
    offset: int
    count: int
    buffer: Buffer
    event: Event | None  # None: nothing came onto the stream


class Ring:
    """A thread, a stream and `buffers` buffers that all requests of one direction share."""

    def __init__(self, device: GpuDevice, name: str, *, buffers: int, buffer_bytes: int) -> None:
        self.stream = device.stream(name)
        self.num_bytes = 0  # that were moved
        self.busy_s = 0.0  # while anything was under way
        self.buffer_bytes = buffer_bytes
        shape = (buffer_bytes,)
        self._free = [
            Buffer(device.pinned(shape, torch.uint8), device.empty(shape, torch.uint8)) for _ in range(buffers)
        ]
        self._under_way: deque[_Chunk] = deque()
        self._waiting: list[_Request] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._busy_since = 0.0
        self._thread = threading.Thread(target=self._run, name=f"strata-{name}", daemon=True)
        self._thread.start()

    def give(self, mover: Mover, num_bytes: int, grain_bytes: int, priority: Priority, ended: Ended | None) -> Transfer:
        """Asks for bytes to be moved in chunks of whole grains; DeviceError after the ring was closed."""
        if not 0 < grain_bytes <= self.buffer_bytes or num_bytes % grain_bytes:
            raise ValueError(f"{num_bytes} bytes in grains of {grain_bytes} through buffers of {self.buffer_bytes}")
        transfer = Transfer(num_bytes, ended)
        chunk_bytes = self.buffer_bytes // grain_bytes * grain_bytes
        request = _Request(priority, next(self._numbers), transfer, mover, chunk_bytes)
        if num_bytes == 0:
            transfer.was_given(self.stream.record(), None)
            transfer.was_done(None)
            return transfer
        with self._changed:
            if self._closed:
                raise DeviceError("a transfer after the device was closed")
            heapq.heappush(self._waiting, request)
            self._changed.notify()
        return transfer

    def close(self) -> None:
        """Gives up what has not begun, and ends the thread; twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        """The thread's life."""
        while (request := self._next()) is not None or self._under_way:
            if request is not None:
                self._begin(request)
            else:
                self._end(self._under_way.popleft())

    def _next(self) -> _Request | None:
        """The request whose next chunk can begin; None when a chunk under way must end before, or all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._under_way or self._closed)
            if self._closed:
                waiting, self._waiting = self._waiting, []
            elif self._waiting:
                request = self._waiting[0]
                urgent = request.priority is Priority.DEMAND
                return request if self._free and (urgent or len(self._under_way) < UNDER_WAY) else None
            else:
                return None
        for request in waiting:
            self._give_up(request, DeviceError("the device was closed during a transfer"))
        return None

    def _begin(self, request: _Request) -> None:
        if not self._under_way:
            self._busy_since = time.perf_counter()
        offset, count = request.begun, min(request.chunk_bytes, request.transfer.num_bytes - request.begun)
        buffer = self._free.pop()
        request.begun += count
        event = None
        try:
            request.mover.begin(offset, count, buffer)
            event = self.stream.record()
        except Exception as error:  # noqa: BLE001 - told by the transfer
            request.error = _told(error)
        request.under_way += 1
        self._under_way.append(_Chunk(request, offset, count, buffer, event))
        if request.is_given:
            self._forget(request)
            request.transfer.was_given(None if request.error else event, request.error)

    def _end(self, chunk: _Chunk) -> None:
        request = chunk.request
        try:
            if chunk.event is not None:
                chunk.event.synchronize()
            if request.error is None:
                request.mover.end(chunk.offset, chunk.count, chunk.buffer)
                self.num_bytes += chunk.count
        except Exception as error:  # noqa: BLE001 - told by the transfer
            self._fail(request, _told(error))
            self._clear()
        self._free.append(chunk.buffer)
        request.under_way -= 1
        if request.is_given and not request.under_way:
            request.transfer.was_done(request.error)
        if not self._under_way:
            self.busy_s += time.perf_counter() - self._busy_since

    def _fail(self, request: _Request, error: StrataError) -> None:
        """What is left of the request is not begun."""
        was_given = request.is_given
        request.error = request.error or error
        if not was_given:
            self._forget(request)
            request.transfer.was_given(None, request.error)

    def _forget(self, request: _Request) -> None:
        """Nothing of it waits any more."""
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                heapq.heapify(self._waiting)

    def _clear(self) -> None:
        """After a failure the stream may go on, unless the GPU itself has failed."""
        try:
            self.stream.synchronize()
        except Exception as error:  # noqa: BLE001 - every transfer that is under way tells it
            for chunk in self._under_way:
                self._fail(chunk.request, _told(error))

    def _give_up(self, request: _Request, error: StrataError) -> None:
        """A request that was taken out of those that wait."""
        request.error = error
        request.transfer.was_given(None, error)
        if not request.under_way:
            request.transfer.was_done(error)


def _told(error: Exception) -> StrataError:
    """As an error that a user may meet."""
    if isinstance(error, StrataError):
        return error
    told = DeviceError(
        f"a transfer between host memory and GPU failed: {error}", hint="see the system's log of the GPU"
    )
    told.__cause__ = error
    return told
