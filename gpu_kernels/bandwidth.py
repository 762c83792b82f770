"""How fast a torch device reads, multiplies, and exchanges bytes with the host: products, launches, and copies.

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
    """What one GPU does through torch: float32 matrices by a vector, float16 products, and pinned copies.

    `handover_s`: a small copy to the host, and until the host knows that it is there. 0: not measured.
    """

    name: str
    matvec_bytes_per_s: float
    matmul_flops_per_s: float
    op_overhead_s: float
    link_to_bytes_per_s: float = 0.0
    link_from_bytes_per_s: float = 0.0
    handover_s: float = 0.0


def measure_rates(name: str, torch_device: str, *, side: int = 8192) -> GpuRates:
    """Measure the device `torch_device` with products of `side` x `side` matrices, and copies of a quarter of one.

    256 MiB and 64 MiB at 8192.
    """
    import torch  # noqa: PLC0415  optional here: seconds to import, and only where there is a GPU

    device = torch.device(torch_device)
    with torch.inference_mode():
        matrix = torch.ones((side, side), device=device)
        vector = torch.ones(side, device=device)
        factor = torch.ones((side // 2, side // 2), device=device, dtype=_product_type(device))
        host = _pinned(torch.ones((side // 2, side // 2)), device)
        there = torch.empty_like(host, device=device)
        word, one = _pinned(torch.ones(1), device), torch.ones(1, device=device)
        small = torch.ones((32, 32), device=device)
        calls = 200

        def launches() -> None:
            for _ in range(calls):
                torch.mv(small, small[0])

        return GpuRates(
            name=name,
            matvec_bytes_per_s=4 * side * side / _best_seconds(lambda: torch.mv(matrix, vector), device),
            matmul_flops_per_s=2 * (side // 2) ** 3 / _best_seconds(lambda: torch.mm(factor, factor), device),
            op_overhead_s=_best_seconds(launches, device) / calls,
            link_to_bytes_per_s=host.nbytes / _best_seconds(lambda: there.copy_(host, non_blocking=True), device),
            link_from_bytes_per_s=host.nbytes / _best_seconds(lambda: host.copy_(there, non_blocking=True), device),
            handover_s=_best_seconds(lambda: word.copy_(one, non_blocking=True), device),
        )


def _product_type(device: "torch.device") -> "torch.dtype":
    import torch  # noqa: PLC0415  as above

    return torch.float32 if device.type == "cpu" else torch.float16


def _pinned(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    return tensor.pin_memory() if device.type == "cuda" else tensor


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
