"""How fast a torch device reads and multiplies: float32 matrix-vector and matrix-matrix products, and launch cost.

Knows nothing about models or plans. torch is imported on use: only machines with a GPU pay for it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_RUNS = 5


@dataclass(frozen=True, slots=True)
class GpuRates:
    """What one GPU does with float32 matrices through torch."""

    name: str
    matvec_bytes_per_s: float
    matmul_flops_per_s: float
    op_overhead_s: float


def measure_rates(name: str, torch_device: str, *, side: int = 8192) -> GpuRates:
    """Measure the device `torch_device` with products of `side` x `side` matrices (256 MiB at 8192)."""
    import torch  # noqa: PLC0415  optional here: seconds to import, and only where there is a GPU

    device = torch.device(torch_device)
    with torch.inference_mode():
        matrix = torch.ones((side, side), device=device)
        vector = torch.ones(side, device=device)
        half = matrix[: side // 2, : side // 2].contiguous()
        small = torch.ones((32, 32), device=device)
        calls = 200

        def launches() -> None:
            for _ in range(calls):
                torch.mv(small, small[0])

        return GpuRates(
            name=name,
            matvec_bytes_per_s=4 * side * side / _best_seconds(lambda: torch.mv(matrix, vector), device),
            matmul_flops_per_s=2 * (side // 2) ** 3 / _best_seconds(lambda: torch.mm(half, half), device),
            op_overhead_s=_best_seconds(launches, device) / calls,
        )


def _best_seconds(work: Callable[[], object], device: "torch.device") -> float:
    import torch  # noqa: PLC0415  as above

    def finish() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    work()
    finish()
    best = float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        work()
        finish()
        best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)
