"""Products with torch whose results for a row are the same to the bit whatever rows stand beside it, and wherever.

A matrix product of torch's libraries sums in an order that depends on how many rows there are. Here all are made of
tiles of one size, filled up with zeros; that a tile's rows are summed alike is not taken for granted but tried, once
for every shape. Weights are decoded some rows at a time. Knows nothing about kernels of other kinds.
"""

from functools import cache

import torch

from gpu_kernels.dequantize import dequantize
from gpu_kernels.matrix import GpuMatrix

TILE = 16  # rows of x
_WEIGHTS_AT_ONCE = {"cpu": 1 << 19}  # decoded: 2 MiB, which caches hold (decoding takes a quarter of the time then)
_WEIGHTS_ELSEWHERE = 1 << 24  # 64 MiB
_ALIGNED = 16  # numbers: a tile's rows then begin at multiples of 64 bytes


def product(x: torch.Tensor, w: GpuMatrix) -> torch.Tensor:
    """x (n, columns) of any float type @ w^T: a new float32 (n, rows)."""
    tiles = Tiles(x)
    out = torch.empty((x.shape[0], w.rows), dtype=torch.float32, device=x.device)
    step = max(1, _WEIGHTS_AT_ONCE.get(x.device.type, _WEIGHTS_ELSEWHERE) // w.columns)
    for first in range(0, w.rows, step):
        count = min(step, w.rows - first)
        tiles.multiply(dequantize(w.rows_from(first, count)), out[:, first : first + count])
    return out


class Tiles:
    """Rows (n, columns), copied to where they are multiplied: float32, zeros behind the last, aligned."""

    def __init__(self, x: torch.Tensor) -> None:
        self._rows, self._columns = x.shape
        shape = (-(-self._rows // TILE) * TILE, -(-self._columns // _ALIGNED) * _ALIGNED)
        self._x = torch.zeros(shape, dtype=torch.float32, device=x.device)
        self._x[: self._rows, : self._columns] = x

    def multiply(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """out (n, rows) float32 = the products with weights (rows, columns), contiguous float32."""
        step = TILE if sums_alike(weights.device, TILE, self._columns, len(weights)) else 1
        for first in range(0, self._rows, step):
            tile = self._x[first : first + step, : self._columns] @ weights.T
            out[first : first + step] = tile[: self._rows - first]


@cache
def sums_alike(device: torch.device, rows: int, columns: int, results: int, batch: int | None = None) -> bool:
    """Whether a product of `rows` equal rows with (results, columns) weights, transposed, has equal rows, to the bit.

    Rows lie as in `Tiles`; with `batch`, of so many products at once, side by side. Waits for the device, the first
    time.
    """
    generator = torch.Generator(device).manual_seed(1)
    leading = () if batch is None else (batch,)
    weights = torch.randn((*leading, results, columns), generator=generator, device=device)
    width = columns if batch is not None else -(-columns // _ALIGNED) * _ALIGNED
    x = torch.zeros((*leading, rows, width), device=device)
    x[..., :columns] = torch.randn(columns, generator=generator, device=device)
    found = x[..., :columns] @ weights.transpose(-1, -2)
    return bool((found == found[..., :1, :]).all())
