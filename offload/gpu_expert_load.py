"""An expert on its way from its file into a place of GPU memory: reads, then uploads, and what waits for them.

Knows nothing about why it is brought. Invariant: a load ends, with its bytes there or with an error, and calls who
waits for it exactly once, however it ends.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gpu_kernels.matrix import GpuMatrix
from offload.errors import DeviceError, StrataError
from offload.flash import FlashReader, Priority
from offload.raw_experts import RawRows
from offload.transfer import MatrixRows, TransferEngine


class GpuExpertLoad:
    """Begins to bring the runs of an expert into `place` of its layer's stacks."""

    def __init__(
        self,
        runs: Sequence[RawRows],
        stacks: Sequence[GpuMatrix],
        place: int,
        reader: FlashReader,
        engine: TransferEngine,
        priority: Priority,
    ) -> None:
        self.place = place
        self._stacks, self._engine, self._priority = stacks, engine, priority
        self._left = len(runs)  # that have not ended
        self._error: StrataError | None = None
        self._waiting: list[Callable[[], None]] = []
        self._done = threading.Event()
        self._lock = threading.Lock()
        for run in runs:
            try:
                reader.submit(run.extent, partial(self._consume, run), self._ended, priority)
            except StrataError as error:
                self._ended(error)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def when_done(self, call: Callable[[], None]) -> None:
        """Calls it, on any thread, when the load has ended, well or not; at once if it has."""
        with self._lock:
            if self._left:
                self._waiting.append(call)
                return
        call()

    def outcome(self) -> StrataError | None:
        """When it has ended: why the expert is not there, if it is not."""
        self._done.wait()
        return self._error

    def abandon(self) -> None:
        """Ends it where it is: its reads were cancelled."""
        with self._lock:
            left, self._left = self._left, 0
            if left:
                closed = DeviceError("the expert's file was closed while it was brought to the GPU")
                self._error = self._error or closed
        if left:
            self._end()

    def _consume(self, run: RawRows, data: NDArray[np.uint8]) -> None:
        """On a thread that reads: the bytes are only valid during the call."""
        if run.look is not None:
            run.look(data)
        rows = MatrixRows(self._stacks[run.part], self.place, run.first_row)
        self._engine.upload(data, rows, priority=self._priority, ended=self._ended).wait_given()

    def _ended(self, error: StrataError | None) -> None:
        """A run is there, or will not be."""
        with self._lock:
            if not self._left:  # abandoned
                return
            self._error = self._error or error
            self._left -= 1
            if self._left:
                return
        self._end()

    def _end(self) -> None:
        for call in self._waiting:
            call()
        self._done.set()
