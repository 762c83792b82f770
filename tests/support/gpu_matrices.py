"""Random quantised matrices with ordinary scales, as raw GGUF bytes and as float32 weights."""

import numpy as np
import torch
from numpy.typing import NDArray

from cpu_kernels.quant_types import quant_type
from cpu_kernels.reference.dequantize import dequantize
from gpu_kernels.layouts import layout


def raw_rows(name: str, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random raw rows of shape (..., rows, columns) in bytes; scales are ordinary numbers, so weights are finite."""
    block = layout(name)
    rng = np.random.default_rng([seed, *shape])
    blocks = shape[-1] // block.block_size
    raw = rng.integers(0, 256, (*shape[:-1], blocks, block.block_bytes), dtype=np.uint8)
    for field in block.fields:
        if field.dtype in {"float16", "float32"}:
            dtype = "<f2" if field.dtype == "float16" else "<f4"
            size = 0.05 if field.name in {"scale", "shift"} else 1.0
            numbers = (rng.standard_normal((*shape[:-1], blocks, field.count)) * size).astype(dtype)
            raw[..., field.offset : field.offset + field.num_bytes] = numbers.view(np.uint8)
    if name == "BF16":
        raw = (rng.standard_normal((*shape[:-1], blocks)).astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8)
    elif name == "MXFP4":
        raw[..., 0] = rng.integers(120, 126, raw.shape[:-1])
    elif name == "NVFP4":
        raw[..., :4] = rng.integers(30, 60, (*raw.shape[:-1], 4))
    elif name == "IQ1_M":  # its scale's sign and exponent lie in the top nibble of the last number: about 0.06
        raw[..., 55] = raw[..., 55] & 15 | 0x20
    return raw.reshape(*shape[:-1], -1)


def weights_of(raw: NDArray[np.uint8], name: str) -> torch.Tensor:
    """The float32 weights of raw rows, by the reference."""
    return torch.from_numpy(dequantize(raw, quant_type(name)))


def normal(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal float32 numbers, the same for the same seed and shape."""
    return torch.from_numpy((np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32))


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """No number is off by more than `tolerance` of the greatest wanted one, and none is NaN."""
    off = (found.double() - wanted.double()).abs().max().item()
    greatest = wanted.double().abs().max().item()
    assert off <= tolerance * greatest, f"off by {off / max(greatest, 1e-300):.2e} of the greatest"
