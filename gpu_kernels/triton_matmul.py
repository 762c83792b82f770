"""Launches of the product kernels: arguments, grids and buffers for one matrix or for the experts of a stack.

Knows nothing about which way is chosen. Buffers come from torch's allocator, in the order of the stream.
"""

from dataclasses import dataclass

import torch

from gpu_kernels.decoding import DECODINGS, Decoding, planes_by_role
from gpu_kernels.matrix import GpuMatrix
from gpu_kernels.tiles import GpuTraits, ProductTile, ceil_div, few_columns_tile, many_columns_tile
from gpu_kernels.triton_products import (
    decode_kernel,
    few_columns_kernel,
    halve_kernel,
    many_columns_kernel,
    sum_splits_kernel,
)

_DECODED_WEIGHTS = 1 << 25  # float16 at a time: 64 MiB
_SUM_BLOCK = 256
_HALVE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Product:
    """One product: x (tokens, columns) times w or, with `segments`, the experts of w; see `Kernels`."""

    x: torch.Tensor
    w: GpuMatrix
    out: torch.Tensor
    gpu: GpuTraits
    is_exact: bool
    adds: bool = False
    scale: float = 1.0
    bias: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    @property
    def decoding(self) -> Decoding:
        """Of the matrix."""
        return DECODINGS[self.w.quant_type]

    @property
    def tokens(self) -> int:
        """Columns of the product; pairs, for experts."""
        return self.x.shape[0]

    def few(self, columns: int | None = None) -> None:
        """With `few_columns_kernel`; `columns`: those taken at a time for experts."""
        tile = few_columns_tile(self.decoding, columns or self.tokens, self.w.rows, self.w.columns, self.gpu)
        few_columns_kernel[(ceil_div(self.w.rows, tile.rows), self._programs(tile))](
            *(self.x, self.out, *self._tables(), *planes_by_role(self.w), self._slot_strides()),
            *(self.tokens, self.w.rows, self.w.columns, self.decoding.groups(self.w.columns), 1),
            *(self.x.stride(0), self.out.stride(0), self.scale),
            **self._constants(tile),
            HAS_BIAS=self.bias is not None,
            ADDS=self.adds,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )

    def many(self, columns: int | None = None) -> None:
        """With `many_columns_kernel`, whose numbers are float16 where matrix units take them, unless `is_exact`."""
        is_float32 = self._is_float32(self.gpu.has_matrix_units)
        shape = (columns or self.tokens, self.w.rows, self.w.columns)
        tile = many_columns_tile(self.decoding, *shape, self.gpu, is_float32=is_float32)
        if self.segments is not None:
            tile = ProductTile(tile.columns, tile.rows, tile.groups, tile.warps)
        x, factors = self._inputs(is_float32)
        groups = self.decoding.groups(self.w.columns)
        is_split = tile.splits > 1
        out, split_stride = self.out, 0
        if is_split:
            out = torch.empty((tile.splits, self.tokens, self.w.rows), dtype=torch.float32, device=x.device)
            split_stride = out.stride(0)
        many_columns_kernel[(ceil_div(self.w.rows, tile.rows), self._programs(tile), tile.splits)](
            *(x, factors, out, *self._tables(), *planes_by_role(self.w), self._slot_strides()),
            *(self.tokens, self.w.rows, self.w.columns, groups, x.stride(0), out.stride(-2)),
            *(split_stride, tile.split_groups(groups), self.scale),
            **self._constants(tile),
            HAS_BIAS=self.bias is not None and not is_split,
            ADDS=self.adds and not is_split,
            IS_SPLIT=is_split,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
        if is_split:
            self._sum(out, tile.splits, split_stride)

    def decoded(self) -> None:
        """Some rows at a time are decoded and multiplied by torch: as float16 where GPUs have units for it (Volta on).

        Results are then rounded to float16, at the scale of the row of x; not if `is_exact`.
        """
        x, factors = self._inputs(self._is_float32(self.gpu.capability >= 70))
        scaled = factors[:, None] * self.scale
        step = max(1, _DECODED_WEIGHTS // self.w.columns)
        for first in range(0, self.w.rows, step):
            count = min(step, self.w.rows - first)
            weights = torch.empty((count, self.w.columns), dtype=x.dtype, device=x.device)
            decode(self.w.rows_from(first, count), weights)
            product = (x @ weights.T).float() * scaled
            if self.bias is not None:
                product = product + self.bias[first : first + count]
            target = self.out[:, first : first + count]
            target.copy_(target + product if self.adds else product)

    def _is_float32(self, halves_pay: bool) -> bool:
        """Whether the product is one of float32 numbers."""
        return self.is_exact or not halves_pay or self.w.quant_type == "F32"

    def _inputs(self, is_float32: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """x in the type of the product, and what undoes its scale (tokens,)."""
        if is_float32:
            return self.x.float(), torch.ones(self.tokens, device=self.x.device)
        halves = torch.empty(self.x.shape, dtype=torch.float16, device=self.x.device)
        factors = torch.empty(self.tokens, device=self.x.device)
        halve_kernel[(self.tokens,)](
            *(self.x, halves, factors, self.x.shape[1], self.x.stride(0)), BLOCK=_HALVE_BLOCK, enable_fp_fusion=True
        )
        return halves, factors

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Segments, scales and bias, or something in their place that is not read."""
        return tuple(self.x if table is None else table for table in (self.segments, self.scales, self.bias))  # type: ignore[return-value]

    def _slot_strides(self) -> tuple[int, ...]:
        """Numbers of a slot of each plane."""
        return tuple(plane.stride(0) if self.segments is not None else 0 for plane in planes_by_role(self.w))

    def _programs(self, tile: ProductTile) -> int:
        """Of the second axis: segments; or column tiles, which `few_columns_kernel` goes through itself."""
        if self.segments is not None:
            return self.segments.shape[0]
        return 1 if tile.columns < 16 else ceil_div(self.tokens, tile.columns)

    def _constants(self, tile: ProductTile) -> dict[str, object]:
        return {
            "QUANT": self.w.quant_type,
            "PARTS": self.decoding.parts,
            "UNITS": self.decoding.units,
            "HAS_SHIFT": has_shift(self.w),
            "N": tile.columns,
            "R": tile.rows,
            "G": tile.groups,
            "IS_EXPERT": self.segments is not None,
            "HAS_FACTORS": self.scales is not None,
        }

    def _sum(self, parts: torch.Tensor, splits: int, split_stride: int) -> None:
        sum_splits_kernel[(self.tokens, ceil_div(self.w.rows, _SUM_BLOCK))](
            *(parts, self.out, self.x if self.bias is None else self.bias),
            *(splits, self.w.rows, self.out.stride(0), split_stride, self.scale),
            HAS_BIAS=self.bias is not None,
            ADDS=self.adds,
            BLOCK=_SUM_BLOCK,
            enable_fp_fusion=True,
        )


def has_shift(w: GpuMatrix) -> bool:
    """Whether weights have something added after the scale."""
    return any(field.name == "shift" for field in w.layout.fields)


def decode(w: GpuMatrix, out: torch.Tensor) -> None:
    """out (rows, columns), contiguous, of any float type = the weights."""
    decoding = DECODINGS[w.quant_type]
    groups = decoding.groups(w.columns)
    decode_kernel[(ceil_div(w.rows, 4), ceil_div(groups, 32))](
        *(out, *planes_by_role(w), w.rows, w.columns, groups),
        QUANT=w.quant_type,
        PARTS=decoding.parts,
        UNITS=decoding.units,
        HAS_SHIFT=has_shift(w),
        R=4,
        G=32,
        enable_fp_fusion=True,
    )
