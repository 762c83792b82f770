"""The operations of a step, each launched on a stream with what it costs: what a hybrid executor calls.

Knows nothing about models. One method an operation of `Kernels`, with the same arguments; costs come from shapes: bytes
that must cross the GPU's memory once (weights, activations, cache), and flops with a multiply-add as two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from gpu_kernels.blocks import KVBlocks, Lanes, Rotation
from gpu_kernels.device import Cost, CostOf
from gpu_kernels.kernels import Kernels
from gpu_kernels.matrix import GpuMatrix


class Launcher(Protocol):
    """What operations need of a stream."""

    def launch(self, call: Callable[[], None], cost: CostOf, name: str = "") -> None:
        """See `Stream.launch`."""
        ...


@dataclass(frozen=True, slots=True)
class Operations:
    """Launches on one stream."""

    stream: Launcher
    kernels: Kernels

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
        call = partial(self.kernels.matmul, x, w, out, adds=adds, scale=scale, bias=bias)
        self.stream.launch(call, matmul_cost(w, x.shape[0]), "matmul")

    def expert_matmul(
        self,
        x: torch.Tensor,
        w: GpuMatrix,
        segments: torch.Tensor,
        out: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
    ) -> None:
        """See `Kernels.expert_matmul`. What it costs is in the segments, which are looked at when its turn comes."""
        call = partial(self.kernels.expert_matmul, x, w, segments, out, scales=scales)
        self.stream.launch(call, partial(segments_cost, w, segments), "expert_matmul")

    def gather_rows(self, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """See `Kernels.gather_rows`."""
        self.stream.launch(partial(self.kernels.gather_rows, x, index, out), _passes(2, out), "gather_rows")

    def scatter_add_weighted(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor,
        token_of_pair: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """See `Kernels.scatter_add_weighted`."""
        call = partial(self.kernels.scatter_add_weighted, out, y, weights, token_of_pair, count)
        self.stream.launch(call, _passes(2, out) + _passes(1, y), "scatter_add_weighted")

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float, heads: int = 1) -> None:
        """See `Kernels.rms_norm`."""
        call = partial(self.kernels.rms_norm, x, weight, out, eps=eps, heads=heads)
        self.stream.launch(call, _passes(2, x), "rms_norm")

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
        call = partial(self.kernels.add_norm, x, delta, weight, out, eps=eps, delta_weight=delta_weight)
        self.stream.launch(call, _passes(4, x), "add_norm")

    def add(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """See `Kernels.add`."""
        self.stream.launch(partial(self.kernels.add, out, x), _passes(3, out), "add")

    def add_gated(self, out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> None:
        """See `Kernels.add_gated`."""
        self.stream.launch(partial(self.kernels.add_gated, out, x, gate), _passes(3, out), "add_gated")

    def gate(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, *, activation: str) -> None:
        """See `Kernels.gate`."""
        call = partial(self.kernels.gate, gate, up, out, activation=activation)
        self.stream.launch(call, _passes(3, out), "gate")

    def softcap(self, x: torch.Tensor, *, cap: float) -> None:
        """See `Kernels.softcap`."""
        self.stream.launch(partial(self.kernels.softcap, x, cap=cap), _passes(2, x), "softcap")

    def scale_bias(self, x: torch.Tensor, *, scale: float = 1.0, bias: torch.Tensor | None = None) -> None:
        """See `Kernels.scale_bias`."""
        self.stream.launch(partial(self.kernels.scale_bias, x, scale=scale, bias=bias), _passes(2, x), "scale_bias")

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
        places = (queries, keys, values, positions, rotation, cache, lanes)
        call = partial(self.kernels.heads, *places, query_norm=query_norm, key_norm=key_norm, eps=eps)
        cost = _passes(2, queries) + _passes(1, keys) + _passes(1, values) + Cost(cache.token_bytes * keys.shape[0])
        self.stream.launch(call, cost, "heads")

    def attention(
        self,
        queries: torch.Tensor,
        cache: KVBlocks,
        lanes: Lanes,
        out: torch.Tensor,
        *,
        context: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        marks: torch.Tensor | None = None,
    ) -> None:
        """See `Kernels.attention`; `context`: the tokens of all lanes together, for the cost."""
        place = (queries, cache, lanes, out)
        call = partial(self.kernels.attention, *place, scale=scale, window=window, softcap=softcap, marks=marks)
        self.stream.launch(call, attention_cost(queries, cache, lanes.count, context, window), "attention")

    def join_parts(self, out: torch.Tensor, marks: torch.Tensor, part: torch.Tensor) -> None:
        """See `Kernels.join_parts`."""
        call = partial(self.kernels.join_parts, out, marks, part)
        self.stream.launch(call, _passes(2, out) + _passes(1, part), "join_parts")

    def route(
        self, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, norm: bool, scale: float = 1.0
    ) -> None:
        """See `Kernels.route`."""
        call = partial(self.kernels.route, logits, ids, weights, norm=norm, scale=scale)
        self.stream.launch(call, _passes(1, logits), "route")

    def topk(self, logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> None:
        """See `Kernels.topk`."""
        self.stream.launch(partial(self.kernels.topk, logits, values, ids), _passes(1, logits), "topk")


def matmul_cost(w: GpuMatrix, tokens: int) -> Cost:
    """Of one matrix times `tokens` columns: the matrix once, float32 activations in and out."""
    weight_bytes = w.row_bytes * w.rows
    return Cost(weight_bytes + 4 * tokens * (w.rows + w.columns), 2 * tokens * w.rows * w.columns)


def segments_cost(w: GpuMatrix, segments: torch.Tensor) -> Cost:
    """Of the experts and pairs in the segments, which are read."""
    pairs = [count for count in segments[:, 2].tolist() if count > 0]
    return expert_matmul_cost(w, len(pairs), sum(pairs))


def expert_matmul_cost(w: GpuMatrix, experts: int, pairs: int) -> Cost:
    """Of `experts` slots with `pairs` columns in all."""
    activation_bytes = 4 * pairs * (w.rows + w.columns)
    return Cost(experts * w.row_bytes * w.rows + activation_bytes, 2 * pairs * w.rows * w.columns)


def attention_cost(queries: torch.Tensor, cache: KVBlocks, lanes: int, context: int, window: int | None) -> Cost:
    """Of queries (tokens, heads * key_length) over lanes of `context` tokens in all, of which a window is read."""
    tokens = queries.shape[0]
    each, new = context / lanes, tokens / lanes
    read = each if window is None else min(each, window + new - 1)
    seen = each - (new - 1) / 2 if window is None else min(each - (new - 1) / 2, float(window))  # by a token, mean
    heads = queries.shape[1] // cache.key_length
    out_bytes = 4 * tokens * heads * cache.value_length
    flops = 2 * tokens * heads * seen * (cache.key_length + cache.value_length)
    return Cost(int(read * lanes) * cache.token_bytes + queries.nbytes + out_bytes, int(flops))


def _passes(count: int, x: torch.Tensor) -> Cost:
    """`count` passes over the numbers of a tensor, and about as many flops a number."""
    return Cost(count * x.numel() * x.element_size(), count * x.numel())
