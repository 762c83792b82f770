"""How fast each device is, as measured: what decides which experts are brought to the GPU for a step.

Knows nothing about what the rates are used for, nor how they were measured.
"""

from dataclasses import dataclass

from offload.expert_schedule import ExpertTimes


@dataclass(frozen=True, slots=True)
class HybridRates:
    """Bytes of weights and multiply-adds (as two) a second, with the other device at work; `launch_s`: of a kernel.

    `move_bytes_per_s`: of experts on their way from host memory to the GPU. `read_bytes_per_s`: of the drive that
    experts come from which RAM lacks; None where RAM has them all.
    """

    cpu_bytes_per_s: float
    cpu_flops_per_s: float
    gpu_bytes_per_s: float
    gpu_flops_per_s: float
    move_bytes_per_s: float
    launch_s: float = 5e-6
    read_bytes_per_s: float | None = None

    def times(self, num_bytes: int, num_weights: int) -> ExpertTimes:
        """Of an expert of that size."""

        def gpu_s(tokens: int) -> float:
            computing_s = max(num_bytes / self.gpu_bytes_per_s, 2 * tokens * num_weights / self.gpu_flops_per_s)
            return self.launch_s + computing_s

        def cpu_s(tokens: int) -> float:
            return max(num_bytes / self.cpu_bytes_per_s, 2 * tokens * num_weights / self.cpu_flops_per_s)

        read_s = 0.0 if self.read_bytes_per_s is None else num_bytes / self.read_bytes_per_s
        return ExpertTimes(gpu_s, cpu_s, num_bytes / self.move_bytes_per_s, read_s)
