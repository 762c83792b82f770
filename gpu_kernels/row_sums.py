"""Sums and functions of rows whose results for a row are the same to the bit whatever rows stand beside it, with torch.

torch's own sums depend on how many rows there are, and a vectorised function differs in its last bits from the plain
one that serves what is left over at the end. Here a sum is one of halves, made of additions alone, and functions are
applied to rows that fill whole vectors. On the CPU this holds for one thread. Knows nothing about what rows mean.
"""

from collections.abc import Callable

import torch

_VECTOR = 64  # numbers: a multiple of what torch's loops take at a time


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """The sums over the last dimension (..., n), kept with size 1; in x's type."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        sums = x[..., :half] + x[..., half : 2 * half]
        if x.shape[-1] % 2:
            sums = torch.cat((sums, x[..., 2 * half :]), dim=-1)
        x = sums
    return x


def applied(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x) of every number, x (..., n); the result may be a view."""
    width = x.shape[-1]
    if width % _VECTOR == 0:
        return function(x.contiguous())
    padded = torch.zeros((*x.shape[:-1], -(-width // _VECTOR) * _VECTOR), dtype=x.dtype, device=x.device)
    padded[..., :width] = x
    return function(padded)[..., :width]


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., n) float32 over the root of its mean square, times weight (n,)."""
    mean = row_sums(x * x) / x.shape[-1]
    return x * (1 / torch.sqrt(mean + eps)) * weight
