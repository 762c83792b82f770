"""Kernels for a simulated GPU that leave the arithmetic out, which a CPU cannot do in the time that a GPU takes.

Operations are launched with their costs as always; only what routers choose is drawn. For measurements of times alone.
"""

import torch

from gpu_kernels.matrix import GpuMatrix

DRAWN = 1 << 14  # tokens for which experts are drawn


class LeftOut:
    """Operations that take the simulated GPU's time and nobody else's: results stay as they were, or are 0."""

    name = "left out"

    def __init__(self, expert_count: int) -> None:
        """Draws what routers will choose, so that it takes no time later."""
        self._experts = torch.rand(DRAWN, expert_count).argsort(dim=1).to(torch.int32)  # experts of drawn tokens
        self._next = 0

    def matmul(self, x: torch.Tensor, w: GpuMatrix, out: torch.Tensor, *, adds: bool = False, **_rest: object) -> None:
        """Finite numbers where weights are looked at while they are loaded."""
        if x.shape[0] == 1 and not adds:
            out.zero_()

    def route(self, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, **_rest: object) -> None:
        """The next of what was drawn, all experts alike."""
        tokens, used = ids.shape
        first = self._next if self._next + tokens <= DRAWN else 0
        self._next = first + tokens
        ids.copy_(self._experts[first : self._next, :used])
        weights.fill_(1 / used)

    def nothing(self, *_values: object, **_rest: object) -> None:
        """Takes no time."""

    expert_matmul = gather_rows = scatter_add_weighted = rms_norm = add_norm = add = add_gated = nothing
    gate = softcap = scale_bias = heads = attention = join_parts = topk = nothing
