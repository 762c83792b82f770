"""What differs between two steps of the same shape: positions, lengths and blocks, in one piece of memory.

Knows nothing about what a step computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_kernels.blocks import Lanes
from gpu_kernels.device import GpuDevice
from runtime.executor.hybrid.kv import HybridKV
from runtime.executor.hybrid.kv_pool import BLOCK_TOKENS
from runtime.executor.hybrid.recording import Recording


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a recording is for: `tokens` in all, of `lanes` sequences with tables of `blocks` blocks.

    `context`: tokens of all lanes together that lie on the GPU, as far as costs are concerned; `capacity_tokens`: the
    sequences', as far as angles depend on it. `is_apart`: the first tokens of some lane lie in RAM; `part_windows`:
    sliding windows (None: none) of the layers that see some of those.
    """

    tokens: int
    lanes: int
    blocks: int
    context: int
    capacity_tokens: int
    is_apart: bool = False
    part_windows: frozenset[int | None] = frozenset()


class StepInputs:
    """Positions (tokens,), and `lanes`, on the GPU; all int32. `held`: the lanes without their tokens in RAM."""

    def __init__(self, device: GpuDevice, shape: StepShape) -> None:
        """torch.OutOfMemoryError where the GPU is full."""
        tokens, lanes, blocks = shape.tokens, shape.lanes, shape.blocks
        apart = lanes * (1 + blocks)
        size = (tokens + apart * (2 if shape.is_apart else 1),)
        self._host, self._here = device.pinned(size, torch.int32), device.empty(size, torch.int32)
        self._numbers = self._host.numpy()
        self._numbers[:] = 0
        self._shape = shape
        self.positions = self._here[:tokens]
        self.lanes = self._lanes(self._here[tokens : tokens + apart])
        self.held = self._lanes(self._here[-apart:])

    def fill(self, starts: Sequence[int], caches: Sequence[HybridKV]) -> None:
        """For lanes of these sequences that go on at these positions. Not while a step runs."""
        tokens, lanes, blocks = self._shape.tokens, self._shape.lanes, self._shape.blocks
        each, apart = tokens // lanes, lanes * (1 + blocks)
        first = np.asarray(starts, np.int32)
        self._numbers[:tokens] = (first[:, None] + np.arange(each, dtype=np.int32)).reshape(-1)
        whole, held = self._numbers[tokens : tokens + apart], self._numbers[-apart:]
        for numbers, begins in ((whole, [0] * lanes), (held, [kv.ram_blocks for kv in caches])):
            numbers[:lanes] = first + each - BLOCK_TOKENS * np.asarray(begins, np.int32)
            table = numbers[lanes:].reshape(lanes, blocks)
            for lane, (kv, begin) in enumerate(zip(caches, begins, strict=True)):
                there = kv.ram_blocks - begin
                table[lane, there : there + len(kv.blocks)] = kv.blocks[: blocks - there]

    def _lanes(self, numbers: torch.Tensor) -> Lanes:
        """Lengths, then tables of blocks."""
        lanes, blocks = self._shape.lanes, self._shape.blocks
        return Lanes(numbers[lanes:].view(lanes, blocks), numbers[:lanes])

    def send(self, stream: Recording) -> None:
        """Copies them to the GPU."""
        stream.copy(self._here, self._host)
