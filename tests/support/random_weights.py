"""Random weights in the formats that generated models are written in, the same bytes on every machine.

Drawn from integers, so that no library's transcendental functions come into them.
"""

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Evenly spread over [-1, 1], exactly the same everywhere; deviation 0.577."""
    return rng.integers(-1024, 1025, shape).astype(np.float32) / np.float32(1024)


def quantised(
    rng: np.random.Generator, shape: tuple[int, ...], deviation: float, quant_type: str
) -> tuple[NDArray[Any], gguf.GGMLQuantizationType]:
    """Random weights of that deviation in that type."""
    dtype = gguf.GGMLQuantizationType[quant_type]
    if quant_type == "Q4_K":
        return random_q4_k(rng, shape, deviation), dtype
    weights = uniform(rng, shape) * np.float32(deviation * 3**0.5)
    return gguf.quants.quantize(weights, dtype), dtype


def random_q4_k(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> NDArray[np.uint8]:
    """Random Q4_K blocks, (..., bytes of a row): weights d * scale * (q - 7.5), evenly spread by `deviation`.

    A block of 256: d and dmin as float16, 6-bit scales and minima of 8 parts in 12 bytes, 256 nibbles. Here a part's
    minimum equals its scale and dmin is 7.5 d; q - 7.5 deviates by 4.61 and the mean scale is 47.5.
    """
    blocks = (*shape[:-1], shape[-1] // 256)
    d = np.full((*blocks, 1), deviation / (4.61 * 47.5), np.float16)
    scales = rng.integers(32, 64, (*blocks, 8)).astype(np.uint8)
    low, high = scales[..., :4], scales[..., 4:]
    first = low | (high >> 4 << 6)
    packed = np.concatenate([first, first, (high & 15) | ((high & 15) << 4)], axis=-1)
    nibbles = rng.integers(0, 256, (*blocks, 128)).astype(np.uint8)
    parts = [d.view(np.uint8), (d * np.float16(7.5)).view(np.uint8), packed, nibbles]
    return np.concatenate(parts, axis=-1).reshape(*shape[:-1], -1)
