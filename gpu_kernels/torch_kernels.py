"""Every operation of `Kernels` with torch alone, on any device: the fallback, the simulated GPU's, and the reference.

Results are float32 rounded to the type of `out`, and for every token the same to the bit whatever tokens are computed
beside it; on the CPU with one thread. There a call happens when its inputs exist, so small tables are read; elsewhere
nothing waits for the device once a shape was seen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from gpu_kernels import checks, torch_attention, torch_rows
from gpu_kernels.blocks import KVBlocks, Lanes, Rotation
from gpu_kernels.kernels import SMALLEST_WEIGHT_SUM
from gpu_kernels.matrix import GpuMatrix
from gpu_kernels.row_sums import applied, normed, row_sums
from gpu_kernels.torch_products import product

_FEW_PAIRS = 64  # of an expert product whose segments are known on the device alone

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "relu2": lambda x: functional.relu(x).square(),
}


@dataclass(frozen=True, slots=True)
class TorchKernels:
    """See `Kernels`."""

    name: str = "torch"

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
        """See `Kernels.matmul`."""
        checks.check_matmul(x, w, out, bias)
        result = product(x, w) * scale
        if bias is not None:
            result = result + bias
        out.copy_(out + result if adds else result)

    def expert_matmul(
        self,
        x: torch.Tensor,
        w: GpuMatrix,
        segments: torch.Tensor,
        out: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
    ) -> None:
        """See `Kernels.expert_matmul`."""
        checks.check_expert_matmul(x, w, segments, out, scales)
        if x.device.type == "cpu":
            _experts_one_by_one(x, w, segments, out, scales)
        elif x.shape[0] <= _FEW_PAIRS:
            _experts_pair_by_pair(x, w, segments, out, scales)
        else:
            _experts_of_all_pairs(x, w, segments, out, scales)

    def gather_rows(self, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """See `Kernels.gather_rows`."""
        checks.check_gather(x, index, out)
        known = (index >= 0) & (index < x.shape[0])
        out.copy_(torch.where(known[:, None], x[torch.where(known, index, 0)], 0.0))

    def scatter_add_weighted(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor,
        token_of_pair: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """See `Kernels.scatter_add_weighted`. Accumulating `index_put_` sorts stably: atomics would vary."""
        checks.check_scatter(out, y, weights, token_of_pair, count)
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        if out.device.type == "cpu":
            pairs = int(count)
            terms = y[:pairs].float() * weights[:pairs, None]
            total.index_add_(0, token_of_pair[:pairs].long(), terms)
        else:
            counted = torch.arange(y.shape[0], device=y.device) < count
            terms = torch.where(counted[:, None], y.float() * weights[:, None], 0.0)
            total.index_put_((torch.where(counted, token_of_pair, 0).long(),), terms, accumulate=True)
        out.add_(total)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float, heads: int = 1) -> None:
        """See `Kernels.rms_norm`."""
        checks.check_norm("rms_norm", x, weight, out, heads)
        out.copy_(_normed(x, weight, eps, heads))

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
        """See `Kernels.add_norm`."""
        checks.check_norm("add_norm", x, weight, out, 1)
        checks.check_same("add_norm", x=x, delta=delta)
        checks.check_vector("add_norm", "delta_weight", delta_weight, x.shape[1], torch.float32)
        x.add_(delta if delta_weight is None else _normed(delta, delta_weight, eps, 1))
        out.copy_(_normed(x, weight, eps, 1))

    def add(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """See `Kernels.add`."""
        checks.check_same("add", out=out, x=x)
        out.add_(x)

    def add_gated(self, out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> None:
        """See `Kernels.add_gated`."""
        checks.check_gated(out, x, gate)
        out.add_(x.float() * applied(torch.sigmoid, gate.float()))

    def gate(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, *, activation: str) -> None:
        """See `Kernels.gate`."""
        checks.check_gate(gate, up, out, activation)
        out.copy_(applied(_ACTIVATIONS[activation], gate.float()) * up.float())

    def softcap(self, x: torch.Tensor, *, cap: float) -> None:
        """See `Kernels.softcap`."""
        checks.check_rows("softcap", x=x)
        x.copy_(applied(torch.tanh, x.float() / cap) * cap)

    def scale_bias(self, x: torch.Tensor, *, scale: float = 1.0, bias: torch.Tensor | None = None) -> None:
        """See `Kernels.scale_bias`."""
        checks.check_rows("scale_bias", x=x)
        checks.check_vector("scale_bias", "bias", bias, x.shape[1], torch.float32)
        scaled = x.float() * scale
        x.copy_(scaled if bias is None else scaled + bias)

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
        """See `Kernels.heads`."""
        checks.check_heads(queries, keys, values, positions, rotation, cache, lanes, (query_norm, key_norm))
        tokens, length = queries.shape[0], cache.key_length
        turned = []
        for x, norm in ((queries, query_norm), (keys, key_norm)):
            parts = x.view(tokens, -1, length).float()
            if norm is not None:
                parts = normed(parts, norm, eps)
            turned.append(torch_attention.rotate(parts, positions, rotation))
        if cache.keys.is_turned:
            turned[0] = torch_rows.turned(turned[0])
        queries.copy_(turned[0].flatten(1))
        new_values = values.view(tokens, cache.kv_heads, -1).float()
        torch_attention.append(cache, lanes, positions, turned[1], new_values)

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
        """See `Kernels.attention`."""
        checks.check_attention(queries, cache, lanes, out, window, marks)
        torch_attention.attend(queries, cache, lanes, out, marks, scale=scale, window=window, softcap=softcap)

    def join_parts(self, out: torch.Tensor, marks: torch.Tensor, part: torch.Tensor) -> None:
        """See `Kernels.join_parts`."""
        checks.check_parts(out, marks, part)
        torch_attention.join_parts(out, marks, part)

    def route(
        self, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, norm: bool, scale: float = 1.0
    ) -> None:
        """See `Kernels.route`."""
        checks.check_chosen("route", logits, weights, ids)
        used = ids.shape[1]
        chosen = torch.sort(logits.float(), dim=-1, descending=True, stable=True).indices[:, :used]
        powers = applied(torch.exp, logits.double() - logits.double().amax(-1, keepdim=True))
        shares = (powers.gather(1, chosen) / row_sums(powers)).float()
        if norm:
            shares = shares / row_sums(shares).clamp_min(SMALLEST_WEIGHT_SUM)
        finite = torch.isfinite(logits).all(-1, keepdim=True)
        ids.copy_(chosen)
        weights.copy_(torch.where(finite, shares * scale, torch.nan))

    def topk(self, logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> None:
        """See `Kernels.topk`."""
        checks.check_chosen("topk", logits, values, ids)
        ordered = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
        values.copy_(ordered.values[:, : ids.shape[1]])
        ids.copy_(ordered.indices[:, : ids.shape[1]])


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float, heads: int) -> torch.Tensor:
    parts = x.view(x.shape[0], heads, -1).float()
    return normed(parts, weight, eps).flatten(1)


def _experts_one_by_one(
    x: torch.Tensor, w: GpuMatrix, segments: torch.Tensor, out: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """Segments are read: for the CPU."""
    for slot, first, pairs, expert in segments.tolist():
        if pairs:
            result = product(x[first : first + pairs], w.slot(slot))
            out[first : first + pairs] = result if scales is None else result * scales[expert]


def _experts_pair_by_pair(
    x: torch.Tensor, w: GpuMatrix, segments: torch.Tensor, out: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """Every pair meets its own expert: for few pairs."""
    pair = torch.arange(x.shape[0], device=x.device)[:, None]
    inside = (pair >= segments[:, 1]) & (pair < segments[:, 1] + segments[:, 2])  # (pairs, segments)
    own = segments[inside.int().argmax(1)]
    for number in range(x.shape[0]):
        result = _product_of(x[number : number + 1], w, own[number], scales)
        out[number] = torch.where(inside[number].any(), result[0].to(out.dtype), out[number])


def _experts_of_all_pairs(
    x: torch.Tensor, w: GpuMatrix, segments: torch.Tensor, out: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """Every segment's expert meets all pairs, and keeps its own: for many pairs."""
    pair = torch.arange(x.shape[0], device=x.device)
    for segment in segments:
        inside = (pair >= segment[1]) & (pair < segment[1] + segment[2])
        result = _product_of(x, w, segment, scales)
        out.copy_(torch.where(inside[:, None], result.to(out.dtype), out))


def _product_of(x: torch.Tensor, w: GpuMatrix, segment: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """x times the expert of a segment, which is not read: float32."""
    planes = tuple(plane.index_select(0, segment[:1])[0] for plane in w.planes)
    result = product(x, GpuMatrix(w.quant_type, w.rows, w.columns, planes))
    return result if scales is None else result * scales.index_select(0, segment[3:])
