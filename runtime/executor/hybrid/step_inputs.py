"""What differs between two steps of the same shape: positions, lengths and blocks, in one piece of memory.

Knows nothing about what a step computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_kernels.blocks import Lanes
from gpu_kernels.device import GpuDevice
from runtime.executor.hybrid.recording import Recording


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a recording is for: `tokens` in all, of `lanes` sequences with tables of `blocks` blocks.

    `context`: tokens of all lanes together, as far as costs are concerned; `capacity_tokens`: the sequences', as far as
    angles depend on it.
    """

    tokens: int
    lanes: int
    blocks: int
    context: int
    capacity_tokens: int


class StepInputs:
    """Positions (tokens,), and `lanes`, on the GPU; all int32."""

    def __init__(self, device: GpuDevice, shape: StepShape) -> None:
        """torch.OutOfMemoryError where the GPU is full."""
        tokens, lanes, blocks = shape.tokens, shape.lanes, shape.blocks
        size = (tokens + lanes + lanes * blocks,)
        self._host, self._here = device.pinned(size, torch.int32), device.empty(size, torch.int32)
        self._numbers = self._host.numpy()
        self.positions = self._here[:tokens]
        table = self._here[tokens + lanes :].view(lanes, blocks)
        self.lanes = Lanes(table, self._here[tokens : tokens + lanes])
        self._shape = shape

    def fill(self, starts: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """For lanes that go on at these positions, in these blocks. Not while a step runs."""
        tokens, lanes, blocks = self._shape.tokens, self._shape.lanes, self._shape.blocks
        each = tokens // lanes
        first = np.asarray(starts, np.int32)
        self._numbers[:tokens] = (first[:, None] + np.arange(each, dtype=np.int32)).reshape(-1)
        self._numbers[tokens : tokens + lanes] = first + each
        table = self._numbers[tokens + lanes :].reshape(lanes, blocks)
        for lane, numbers in enumerate(tables):
            table[lane, : len(numbers)] = numbers[:blocks]

    def send(self, stream: Recording) -> None:
        """Copies them to the GPU."""
        stream.copy(self._here, self._host)
