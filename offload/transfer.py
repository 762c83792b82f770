"""Moves bytes between host memory and a GPU beside everything else: weights at load, experts as they are needed.

Two rings of pinned buffers, one for each direction, with a stream and a thread each (`offload.transfer_ring`). Bytes of
a GGUF matrix are arranged on the GPU, by the same stream. Knows nothing about files or which weights should be where.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_kernels.device import Cost, GpuDevice, Stream
from gpu_kernels.matrix import GpuMatrix
from offload.closing import Closing
from offload.flash import Priority
from offload.transfer_ring import Buffer, Ended, Ring, Transfer

BUFFERS = 4
BUFFER_BYTES = 1 << 20  # at 6 GB/s 175 us, and 10 us to begin

Fill = Callable[[int, NDArray[np.uint8]], None]
"""(offset, memory): fills the memory with the source's bytes from there on; called in order, on the ring's thread."""


@dataclass(frozen=True, slots=True)
class MatrixRows:
    """Where raw GGUF rows go: rows of a matrix, or of a slot of a stack."""

    matrix: GpuMatrix
    slot: int | None = None
    first_row: int = 0


class TransferEngine(Closing):
    """Uploads to and downloads from one device."""

    def __init__(self, device: GpuDevice, *, buffers: int = BUFFERS, buffer_bytes: int = BUFFER_BYTES) -> None:
        """torch.OutOfMemoryError where the device has no room for its part of the buffers."""
        self._device = device
        self._size = buffers, buffer_bytes
        self._up = Ring(device, "to-gpu", buffers=buffers, buffer_bytes=buffer_bytes)
        self._down: Ring | None = None  # seldom needed

    @property
    def stream(self) -> Stream:
        """What uploads happen on."""
        return self._up.stream

    @property
    def uploaded_bytes(self) -> int:
        """So far."""
        return self._up.num_bytes

    @property
    def upload_bytes_per_s(self) -> float:
        """As measured while uploads were under way, beside whatever else went on; 0 before the first."""
        return self._up.num_bytes / self._up.busy_s if self._up.busy_s else 0.0

    @staticmethod
    def device_bytes(*, buffers: int = BUFFERS, buffer_bytes: int = BUFFER_BYTES) -> int:
        """What the buffers of one direction take of the GPU's memory."""
        return buffers * buffer_bytes

    def upload(
        self,
        source: NDArray[np.uint8] | Fill,
        target: torch.Tensor | MatrixRows,
        *,
        num_bytes: int | None = None,
        priority: Priority = Priority.DEMAND,
        ended: Ended | None = None,
    ) -> Transfer:
        """Begins to bring bytes to a contiguous tensor of the GPU or, raw GGUF rows, to a matrix.

        `source`: the bytes, (n,) uint8, to be left as they are until `wait_given`; or what fills memory with them, and
        then `num_bytes`. `ended` is called on the ring's thread when the bytes are there, or with why they are not.
        ValueError where the bytes are not the target's.
        """
        if isinstance(source, np.ndarray):
            data = source.reshape(-1).view(np.uint8)
            fill: Fill = lambda offset, memory: np.copyto(memory, data[offset : offset + len(memory)])  # noqa: E731
            num_bytes = len(data)
        else:
            fill = source
        if num_bytes is None:
            raise ValueError("a source that is a function does not tell how many bytes it has")
        stream = self._up.stream
        if isinstance(target, MatrixRows):
            grain = target.matrix.row_bytes
            _check_rows(target, num_bytes)
            return self._up.give(_ToMatrix(stream, fill, target), num_bytes, grain, priority, ended)
        flat = _flat(target)
        if num_bytes != len(flat):
            raise ValueError(f"{num_bytes} bytes for a tensor of {len(flat)}")
        return self._up.give(_ToTensor(stream, fill, flat), num_bytes, 1, priority, ended)

    def download(
        self, source: torch.Tensor, target: NDArray[np.uint8], *, priority: Priority = Priority.DEMAND
    ) -> Transfer:
        """Begins to bring a contiguous tensor of the GPU to host memory, (n,) uint8; ValueError where sizes differ.

        The tensor must have been written before; work of another stream is to be waited for.
        """
        flat = _flat(source)
        if len(target) != len(flat):
            raise ValueError(f"a tensor of {len(flat)} bytes for {len(target)}")
        if self._down is None:
            buffers, buffer_bytes = self._size
            self._down = Ring(self._device, "from-gpu", buffers=buffers, buffer_bytes=buffer_bytes)
        return self._down.give(_FromTensor(self._down.stream, flat, target), len(flat), 1, priority, None)

    def close(self) -> None:
        """Ends the threads; what has not begun fails. The device stays open."""
        for ring in (self._up, self._down):
            if ring is not None:
                ring.close()


class _ToTensor:
    """Fill, copy."""

    def __init__(self, stream: Stream, fill: Fill, target: torch.Tensor) -> None:
        self._stream, self._fill, self._target = stream, fill, target

    def begin(self, offset: int, count: int, buffer: Buffer) -> None:
        self._fill(offset, buffer.host[:count].numpy())
        self._stream.copy(self._target[offset : offset + count], buffer.host[:count])

    def end(self, offset: int, count: int, buffer: Buffer) -> None:
        """Nothing is left to do."""


class _ToMatrix:
    """Fill, copy to the GPU's side of the buffer, and arrange from there."""

    def __init__(self, stream: Stream, fill: Fill, target: MatrixRows) -> None:
        self._stream, self._fill, self._target = stream, fill, target

    def begin(self, offset: int, count: int, buffer: Buffer) -> None:
        self._fill(offset, buffer.host[:count].numpy())
        staged = buffer.staged[:count]
        self._stream.copy(staged, buffer.host[:count])
        target, row_bytes = self._target, self._target.matrix.row_bytes
        rows = staged.view(-1, row_bytes)
        first_row = target.first_row + offset // row_bytes
        self._stream.launch(lambda: target.matrix.write(target.slot, rows, first_row), Cost(2 * count), "arrange")

    def end(self, offset: int, count: int, buffer: Buffer) -> None:
        """Nothing is left to do."""


class _FromTensor:
    """Copy, then read from the buffer."""

    def __init__(self, stream: Stream, source: torch.Tensor, target: NDArray[np.uint8]) -> None:
        self._stream, self._source, self._target = stream, source, target

    def begin(self, offset: int, count: int, buffer: Buffer) -> None:
        self._stream.copy(buffer.host[:count], self._source[offset : offset + count])

    def end(self, offset: int, count: int, buffer: Buffer) -> None:
        np.copyto(self._target[offset : offset + count], buffer.host[:count].numpy())


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, (n,) uint8; ValueError where they are not in one piece."""
    if not tensor.is_contiguous():
        raise ValueError("a tensor that is not contiguous cannot be transferred")
    return tensor.view(-1).view(torch.uint8)


def _check_rows(target: MatrixRows, num_bytes: int) -> None:
    """ValueError unless the bytes are whole rows that the matrix has."""
    matrix = target.matrix
    rows, rest = divmod(num_bytes, matrix.row_bytes)
    has_slot = matrix.slots is None if target.slot is None else 0 <= target.slot < (matrix.slots or 0)
    if rest or not has_slot or not 0 <= target.first_row <= target.first_row + rows <= matrix.rows:
        place = f"row {target.first_row} of slot {target.slot} on"
        shape = f"{matrix.rows} rows of {matrix.row_bytes} bytes in {matrix.slots} slots"
        raise ValueError(f"{num_bytes} bytes from {place}, of a matrix of {shape}")
