"""A simulated GPU whose memory runs out at a chosen allocation."""

from collections.abc import Sequence

import torch

from gpu_kernels.simulated import SimulatedDevice


class FailingDevice(SimulatedDevice):
    """The allocation number `at`, counted from 1, fails; `lasts`: and all after it."""

    def __init__(self, spec: str, at: int, *, lasts: bool = False) -> None:
        super().__init__(spec)
        self._at, self._lasts, self.asked = at, lasts, 0

    @property
    def has_failed(self) -> bool:
        """Whether it came so far."""
        return self.asked >= self._at

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `SimulatedDevice`."""
        self.asked += 1
        if self.asked == self._at or (self._lasts and self.asked > self._at):
            raise torch.OutOfMemoryError(f"allocation {self.asked} was made to fail")
        return super().empty(shape, dtype)
