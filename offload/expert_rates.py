"""How fast the two devices compute routed experts, and how fast experts come to the GPU: what one expert takes.

Knows nothing about how rates are measured, nor what is decided by them. Rates are bytes or operations a second, each
with the other device at work; a multiply-add is two operations.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """What an expert takes on a device: `begin_s`, then the longer of reading it and of multiplying by its tokens."""

    begin_s: float
    read_s: float
    token_s: float

    def seconds(self, tokens: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Of experts with so many tokens each."""
        return self.begin_s + np.maximum(self.read_s, self.token_s * np.asarray(tokens, np.float64))


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """What one expert takes. `read_s`: to read it from flash, one at a time, for either device; 0 where RAM has all."""

    gpu: DeviceTime
    cpu: DeviceTime
    move_s: float  # to copy it to the GPU, one at a time
    read_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpertRates:
    """Of a machine, for a model's experts; `launch_s`: until a kernel of the GPU begins.

    `move_bytes_per_s`: of experts on their way from host memory to the GPU. `read_bytes_per_s`: of the drive that
    experts come from which RAM lacks; None where it has all.
    """

    cpu_bytes_per_s: float
    cpu_flops_per_s: float
    gpu_bytes_per_s: float
    gpu_flops_per_s: float
    move_bytes_per_s: float
    launch_s: float = 5e-6
    read_bytes_per_s: float | None = None

    def times(self, num_bytes: float, num_weights: float) -> ExpertTimes:
        """Of an expert of that size."""
        token_flops = 2 * num_weights
        return ExpertTimes(
            DeviceTime(self.launch_s, num_bytes / self.gpu_bytes_per_s, token_flops / self.gpu_flops_per_s),
            DeviceTime(0.0, num_bytes / self.cpu_bytes_per_s, token_flops / self.cpu_flops_per_s),
            num_bytes / self.move_bytes_per_s,
            0.0 if self.read_bytes_per_s is None else num_bytes / self.read_bytes_per_s,
        )
