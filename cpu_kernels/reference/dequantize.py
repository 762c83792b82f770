"""Stored weights to float32, for every type of `QUANT_TYPES`: plain numpy, equal to the bit to GGML's own decoders.

Knows nothing about files or models. This is the reference that faster kernels are held to. Scales are taken as they
are: one that is NaN or infinite gives weights that are NaN or infinite, for the caller to find.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.quant_types import QuantType
from cpu_kernels.reference import dequantize_iq, dequantize_k, dequantize_simple
from cpu_kernels.reference.dequantize_parts import Decoder

_DECODERS: Mapping[str, Decoder] = {
    **dequantize_simple.DECODERS,
    **dequantize_k.DECODERS,
    **dequantize_iq.DECODERS,
}
_PLAIN_DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_CHUNK_WEIGHTS = 1 << 16  # 256 KiB of float32: intermediate arrays stay in a core's cache


def dequantizable(quant_type: QuantType) -> bool:
    """Whether `dequantize` knows the type."""
    return quant_type.name in _DECODERS or quant_type.name in _PLAIN_DTYPES or quant_type.name == "BF16"


def dequantize(data: NDArray[np.uint8], quant_type: QuantType) -> NDArray[np.float32]:
    """Bytes (..., row_bytes), contiguous, to weights (..., row_bytes // block_bytes * block_size); always a new array.

    NotImplementedError for a type it does not know, ValueError if a row is not a whole number of blocks,
    TypeError if `data` is not uint8.
    """
    if not dequantizable(quant_type):
        raise NotImplementedError(f"dequantising {quant_type.name} is not known")
    if data.dtype != np.uint8:
        raise TypeError(f"quantised bytes must be uint8, not {data.dtype}")
    if data.ndim == 0 or data.shape[-1] % quant_type.block_bytes:
        raise ValueError(
            f"rows of shape {data.shape} are not whole {quant_type.name} blocks of {quant_type.block_bytes} bytes"
        )
    shape = (*data.shape[:-1], data.shape[-1] // quant_type.block_bytes * quant_type.block_size)
    weights = np.empty(shape, dtype=np.float32)
    blocks = np.ascontiguousarray(data).reshape(-1, quant_type.block_bytes)
    with np.errstate(all="ignore"):  # bad scales show in the result
        _decode(blocks, weights.reshape(-1, quant_type.block_size), quant_type)
    return weights


def _decode(blocks: NDArray[np.uint8], out: NDArray[np.float32], quant_type: QuantType) -> None:
    if quant_type.name == "BF16":
        np.left_shift(blocks.view("<u2"), np.uint32(16), out=out.view(np.uint32))
    elif quant_type.name in _PLAIN_DTYPES:
        out[...] = blocks.view(_PLAIN_DTYPES[quant_type.name])
    else:
        decoder = _DECODERS[quant_type.name]
        step = max(1, _CHUNK_WEIGHTS // quant_type.block_size)
        for first in range(0, len(blocks), step):
            decoder(blocks[first : first + step], out[first : first + step])
