"""Weights whose products round their inputs as llama.cpp's CPU kernels do, to show what a difference is due to.

llama.cpp multiplies F16 matrices with float16 activations, Q8_0 and its like with activations in blocks of 32 signed
bytes (Q8_0), and K-quants and ternary types with blocks of 256 (Q8_K); F32 matrices with float32.
"""

import torch

from offload.gguf import TensorInfo
from runtime.weights import Weights


class RoundingWeights(Weights):
    """As `Weights`, but products see rounded inputs."""

    def product(self, x: torch.Tensor, tensor: TensorInfo, expert: int | None = None) -> torch.Tensor:
        """See `Weights.product`."""
        name = tensor.quant_type.name
        if name == "F16":
            x = x.half().float()
        elif name.endswith("_K") or name.startswith("TQ"):
            x = _to_q8_k(x)
        elif name != "F32":
            x = _to_q8_0(x)
        return super().product(x, tensor, expert)


def _to_q8_0(x: torch.Tensor) -> torch.Tensor:
    blocks = x.reshape(len(x), -1, 32)
    d = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(d > 0, blocks / d, 0.0).round()
    return (steps * d.half().float()).reshape(x.shape)


def _to_q8_k(x: torch.Tensor) -> torch.Tensor:
    blocks = x.reshape(len(x), -1, 256)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(extreme != 0, -127 / extreme, 0.0)
    steps = (blocks * inverse).round().clamp_max(127)
    return torch.where(inverse != 0, steps / inverse, 0.0).reshape(x.shape)
