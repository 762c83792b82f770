"""The weights of a GPU matrix as float32, with torch on any device: equal to the bit to GGML's own decoders.

Every type of `LAYOUTS` is known. Knows nothing about products. Scales are taken as they are: NaN gives NaN.
"""

from collections.abc import Callable, Mapping

import torch

from gpu_kernels import dequantize_codebook, dequantize_k, dequantize_simple
from gpu_kernels.dequantize_parts import Planes
from gpu_kernels.matrix import GpuMatrix

_DECODERS: Mapping[str, Callable[[Planes], torch.Tensor]] = {
    **dequantize_simple.DECODERS,
    **dequantize_k.DECODERS,
    **dequantize_codebook.DECODERS,
}
_CHUNK_WEIGHTS = 1 << 22  # decoded at a time: intermediate tensors stay below a few dozen MiB


def dequantize(matrix: GpuMatrix) -> torch.Tensor:
    """A new float32 tensor ([slots,] rows, columns) on the matrix's device."""
    leading = (matrix.rows,) if matrix.slots is None else (matrix.slots, matrix.rows)
    weights = torch.empty((*leading, matrix.columns), dtype=torch.float32, device=matrix.device)
    rows = weights.view(-1, matrix.columns)
    step = max(1, _CHUNK_WEIGHTS // matrix.columns)
    for first in range(0, len(rows), step):
        part = tuple(plane.view(-1, plane.shape[-1])[first : first + step] for plane in matrix.planes)
        rows[first : first + step] = dequantize_planes(matrix.quant_type, part)
    return weights


def dequantize_planes(quant_type: str, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The weights of planes (..., numbers of a row), in the order of the layout's fields: float32 (..., columns)."""
    blocks = Planes.of(quant_type, planes)
    return _DECODERS[quant_type](blocks).reshape(*planes[0].shape[:-1], -1)
