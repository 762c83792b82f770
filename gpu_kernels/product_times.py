"""How long products of each kind take on a CUDA device: for the table of `Dispatch` and for shares of the bandwidth.

Matrices are random bytes, so many that no cache holds them, multiplied in turn in a CUDA graph: neither caches nor the
host's part of a launch count. Knows nothing about models.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gpu_kernels.dispatch import BUCKETS, Dispatch
from gpu_kernels.matrix import GpuMatrix
from gpu_kernels.tiles import GpuTraits
from gpu_kernels.triton_kernels import TritonKernels

_RUNS = 7


@dataclass(slots=True)
class ProductTimes:
    """Products of `rows` x `columns` matrices; `working_bytes` of them take turns (several times the L2 cache)."""

    device: torch.device
    gpu: GpuTraits
    rows: int = 4096
    columns: int = 4096
    working_bytes: int = 256 << 20
    _matrices: dict[tuple[str, int, int], list[GpuMatrix]] = field(default_factory=dict)

    def seconds(self, quant_type: str, tokens: int, way: str) -> float:
        """Of one product of `tokens` columns, the median of some runs."""
        table = {(quant_type, bucket): way for bucket in BUCKETS}
        kernels = TritonKernels(Dispatch(self.gpu, table))
        x = torch.randn((tokens, self.columns), device=self.device)
        out = torch.empty((tokens, self.rows), device=self.device)
        matrices = self._of(quant_type)

        def products() -> None:
            for matrix in matrices:
                kernels.matmul(x, matrix, out)

        return graph_seconds(products) / len(matrices)

    def bytes_per_s(self) -> float:
        """What reading memory reaches here: sums of the working set."""
        numbers = torch.zeros(self.working_bytes // 4, device=self.device)
        return numbers.nbytes / graph_seconds(numbers.sum)

    def matrix_bytes(self, quant_type: str) -> int:
        """Of one matrix."""
        return self._of(quant_type)[0].num_bytes

    def forget(self) -> None:
        """Frees the matrices."""
        self._matrices.clear()

    def _of(self, quant_type: str) -> list[GpuMatrix]:
        key = quant_type, self.rows, self.columns
        if key not in self._matrices:
            self._matrices.clear()
            first = self._random(quant_type)
            count = max(2, -(-self.working_bytes // first.num_bytes))
            self._matrices[key] = [first, *(self._random(quant_type) for _ in range(count - 1))]
        return self._matrices[key]

    def _random(self, quant_type: str) -> GpuMatrix:
        """Codes of any value under small scales: what is multiplied does not matter, infinities might."""
        matrix = GpuMatrix.allocate(quant_type, self.rows, self.columns, empty=self._empty)
        for plane in matrix.planes:
            if plane.is_floating_point():
                plane.fill_(2.0**-7)
            else:
                plane.view(torch.uint8).random_(0, 120)
        return matrix

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


def graph_seconds(work: Callable[[], object]) -> float:
    """The median time of a CUDA graph of what `work` launches; the current device's."""
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(_RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[_RUNS // 2]
