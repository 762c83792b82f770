"""What GPU kernels compute: the protocol that `TorchKernels` and `TritonKernels` implement.

Activations are float32 or float16 tensors on the device, rows after rows; the numbers of a row lie side by side, rows
may be further apart (a slice of columns). Everything is written into tensors that the caller gives. Nothing waits for
the device and no shape depends on numbers that lie there, so calls can be queued before their inputs exist. In steps of
up to `tiles.STEP_COLUMNS` tokens what a token gets is the same to the bit whatever tokens are beside it. Shapes that do
not fit give ValueError, types TypeError. Knows nothing about models, streams or costs.
"""

from typing import Protocol

import torch

from gpu_kernels.blocks import KVBlocks, Lanes, Rotation
from gpu_kernels.matrix import GpuMatrix

ACTIVATIONS = ("silu", "gelu", "sigmoid", "relu2")
SMALLEST_WEIGHT_SUM = 2.0**-14  # of chosen experts' probabilities: the least float16 without loss of precision


class Kernels(Protocol):
    """Every operation of a step."""

    @property
    def name(self) -> str:
        """What to show, such as "torch" or "triton"."""
        ...

    def matmul(
        self,
        x: torch.Tensor,
        w: GpuMatrix,
        out: torch.Tensor,
        *,
        adds: bool = False,
        scale: float = 1.0,
        bias: torch.Tensor | None = None,
    ) -> None:
        """out (tokens, rows) = x (tokens, columns) @ w^T * scale + bias (rows,); with `adds` added to out."""
        ...

    def expert_matmul(
        self,
        x: torch.Tensor,
        w: GpuMatrix,
        segments: torch.Tensor,
        out: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
    ) -> None:
        """out[p] (rows,) = x[p] (columns,) @ w[slot]^T (* scales[expert]) for the pairs of every segment.

        `segments` (n, 4) int32 on the device: slot, first pair, pairs, expert; those of 0 pairs are skipped, and pairs
        in no segment keep what is in out. The pairs of two segments do not overlap.
        """
        ...

    def gather_rows(self, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """out[p] = x[index[p]]; index (pairs,) int32, out as many rows. An index that x has not gives zeros."""
        ...

    def scatter_add_weighted(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor,
        token_of_pair: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """out[t] += sum of weights[p] * y[p] over the pairs p < count with token_of_pair[p] = t, in rising order of p.

        y (pairs, hidden), weights (pairs,) float32, token_of_pair (pairs,) int32, count (1,) int32 on the device; the
        pairs of no other token count. The order of the sum is always the same.
        """
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float, heads: int = 1) -> None:
        """out = x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467) for each of `heads` equal parts of a row.

        `out` may be `x`; weight has as many numbers as a part.
        """
        ...

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        eps: float,
        delta_weight: torch.Tensor | None = None,
    ) -> None:
        """x += delta (with `delta_weight`: the norm of delta), out = the norm of x."""
        ...

    def add(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out += x."""
        ...

    def add_gated(self, out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> None:
        """out += x * sigmoid(gate), gate (tokens, 1): how a shared expert is added."""
        ...

    def gate(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, *, activation: str) -> None:
        """out = activation(gate) * up: "silu", "gelu" (tanh form), "sigmoid", "relu2" (squared); out may be gate."""
        ...

    def softcap(self, x: torch.Tensor, *, cap: float) -> None:
        """x = cap * tanh(x / cap)."""
        ...

    def scale_bias(self, x: torch.Tensor, *, scale: float = 1.0, bias: torch.Tensor | None = None) -> None:
        """x = x * scale + bias (columns,)."""
        ...

    def heads(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        rotation: Rotation,
        cache: KVBlocks,
        lanes: Lanes,
        *,
        query_norm: torch.Tensor | None = None,
        key_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Norms (if given) and rotates queries in place; norms and rotates keys, appends keys and values to the cache.

        Queries are turned where the cache's keys are (`KVRows`).
        queries (tokens, heads * key_length), keys (tokens, kv_heads * key_length), values (tokens, kv_heads *
        value_length), positions (tokens,) int32 on the device, each within its lane's blocks.
        """
        ...

    def attention(
        self,
        queries: torch.Tensor,
        cache: KVBlocks,
        lanes: Lanes,
        out: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        marks: torch.Tensor | None = None,
    ) -> None:
        """out (tokens, heads * value_length): causal attention of each lane's newest tokens over all of its tokens.

        queries (tokens, heads * key_length) as `heads` leaves them; heads h * g to (h + 1) * g - 1 share KV head h. Out
        is turned back where values are turned. `window`: a token sees itself and the window - 1 before it. `marks`
        (tokens, 2 * heads) float32, where the lanes' tokens are a part of what is attended: it takes each head's
        greatest score, then each head's sum of exp(score - greatest).
        """
        ...

    def join_parts(self, out: torch.Tensor, marks: torch.Tensor, part: torch.Tensor) -> None:
        """out = attention over what `out` and `part` have attended each: their mean, weighted by what each has seen.

        out (tokens, heads * value_length) and marks as `attention` gave them; part (tokens, heads * value_length + 2 *
        heads) float32: another out, with its marks behind it. Where a part has seen nothing (its sum is 0), out keeps
        its bits.
        """
        ...

    def route(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        norm: bool,
        scale: float = 1.0,
    ) -> None:
        """Softmax of logits (tokens, experts); the greatest probabilities, of equal ones the lower id first.

        Writes ids (tokens, used) int32 and weights (tokens, used) float32: with `norm` divided by their sum (at least
        2^-14), then times `scale`. Logits that are not finite give the weight NaN.
        """
        ...

    def topk(self, logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> None:
        """The greatest logits of every row in falling order, of equal ones the lower id first.

        values (tokens, k) float32, ids (tokens, k) int32.
        """
        ...
