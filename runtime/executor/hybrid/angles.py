"""Cosines and sines of a model's positions on the GPU. Knows nothing about heads or sequences."""

import torch

from gpu_kernels.blocks import Rotation
from gpu_kernels.device import GpuDevice, Stream
from runtime.architectures.base import Model, Rope, RopeOrder
from runtime.executor.program.angles import Angles
from runtime.executor.rotary import RotaryTable


class GpuAngles:
    """Copies of the tables of `angles`, as far as positions were asked for."""

    def __init__(self, angles: Angles, device: GpuDevice, stream: Stream) -> None:
        self._angles, self._device, self._stream = angles, device, stream
        self._rotations: dict[RotaryTable, Rotation] = {}
        self.generation = 0  # grows when tables have moved

    def reach(self, capacity_tokens: int, stop: int) -> None:
        """Makes tables of positions up to `stop` - 1 for sequences of that capacity; torch.OutOfMemoryError if full."""
        for rope in self._angles.ropes:
            table = self._angles.table(rope, capacity_tokens)
            known = self._rotations.get(table)
            have = 0 if known is None else len(known.cos)
            if stop > have:
                table.at(0, stop)  # made already where a program's lane reaches so far: its tables may not move
                rows = min(table.positions, max(capacity_tokens, stop))
                cos, sin = (self._sent(torch.from_numpy(part)) for part in table.at(0, rows))
                self._rotations[table] = Rotation(cos, sin, neighbours=rope.order is RopeOrder.NORM)
                self.generation += 1

    def rotation(self, rope: Rope, capacity_tokens: int) -> Rotation:
        """The table of a way to turn, as far as `reach` made it."""
        return self._rotations[self._angles.table(rope, capacity_tokens)]

    def _sent(self, part: torch.Tensor) -> torch.Tensor:
        there = self._device.empty(part.shape, torch.float32)
        self._stream.copy(there, part)
        self._stream.synchronize()
        return there


def factors_of(model: Model, capacity_tokens: int) -> tuple[str | None, ...]:
    """Names of what layers' angles are divided by, for sequences of that capacity; None where by nothing."""
    factors = (layer.rope.factors(capacity_tokens) for layer in model.layers)
    return tuple(None if tensor is None else tensor.name for tensor in factors)
