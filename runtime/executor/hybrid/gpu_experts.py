"""The GPU's part of a layer of routed experts, recorded: router, shared expert, and the experts that have places.

What the router decided goes to the host, whose program shares the experts out (`cpu_kernels.expert_split`) and sends
tables back; its own experts' sum comes back too. Knows nothing about which experts have places.
"""

from functools import partial

import torch

from cpu_kernels.expert_split import SEGMENT, SplitTables
from cpu_kernels.experts import most_segments
from gpu_kernels.device import Cost
from gpu_kernels.matrix import GpuMatrix
from runtime.architectures.base import Experts, Layer
from runtime.executor.hybrid.experts import GpuExperts
from runtime.executor.hybrid.gpu_lowering import GpuLowering
from runtime.executor.program.linear import Linear
from runtime.executor.program.routing import Routing
from runtime.executor.program.workspace import Workspace


class ExpertTables:
    """What the host and the GPU tell each other about the experts of a layer, on both sides; shared by all layers."""

    def __init__(self, host: Workspace, capacity: int, experts: Experts, *, keeps_routing: bool) -> None:
        self._host, self._capacity, self._experts = host, capacity, experts
        self._keeps_routing = keeps_routing
        pairs = capacity * experts.used_count
        most = SplitTables(most_segments(capacity, experts.used_count, experts.count), pairs)
        self.most = most.length
        self.array = host.integer_array("split_tables", most.length)

    def layout(self, tokens: int) -> SplitTables:
        """Of the tables of a step of so many tokens."""
        used, count = self._experts.used_count, self._experts.count
        return SplitTables(most_segments(tokens, used, count), tokens * used)

    def routing(self, layer: Layer) -> Routing:
        """Where what the layer's router decides goes on the host."""
        pairs = self._capacity * self._experts.used_count
        return Routing(self._host, pairs, layer.index if self._keeps_routing else None)


class ExpertLowering:
    """Records layers with routed experts through the lowering of a step."""

    def __init__(self, lowering: GpuLowering, experts: GpuExperts, tables: ExpertTables) -> None:
        model = lowering.gpu.model
        assert model.experts is not None, "only routed models have experts"
        self._lowering, self._gpu_experts, self._tables = lowering, experts, tables
        self._ops, self._experts = lowering.ops, model.experts
        self._pairs = lowering.shape.tokens * model.experts.used_count
        self._layout = tables.layout(lowering.shape.tokens)
        self._numbers = lowering.gpu.buffers.vector("split_tables", self._layout.length, tables.most, torch.int32)

    def layer(self, layer: Layer, *, few: bool) -> None:
        """x plus what the layer's experts make of it, in steps of few tokens or of many."""
        lowering, is_resident = self._lowering, self._gpu_experts.is_resident(layer.index)
        lowering.norm(layer.ffn_norm)
        self._route(layer, is_resident=is_resident)
        shared = self._shared(layer)
        stacks = self._gpu_experts.stacks(layer.index)
        outputs: torch.Tensor | None = None
        lowering.side.wait()
        if stacks is not None:
            outputs = self._outputs(layer, stacks, few=few)
        if is_resident:
            delta = lowering.delta
            lowering.stream.launch(partial(_zero, delta), Cost(delta.nbytes), "zero")
        else:
            lowering.side.wait()
            lowering.copy_in("delta", lowering.delta.shape[1])
        if outputs is not None:
            count, weights = self._numbers[:1], self._weights()
            self._ops.scatter_add_weighted(lowering.delta, outputs, weights, self._tokens(), count)
        if shared is not None:
            self._ops.add_gated(lowering.delta, *shared)
        lowering.add_later(layer.post_ffw_norm)

    def _route(self, layer: Layer, *, is_resident: bool) -> None:
        """Ids and weights of every token's experts, and what they see, to the host."""
        lowering, experts, buffers = self._lowering, self._experts, self._lowering.gpu.buffers
        tokens, used = lowering.shape.tokens, experts.used_count
        logits = lowering.matrix("router_logits", experts.count)
        lowering.linear(lowering.normed, [Linear.of(layer, "ffn_gate_inp")], logits)
        most = buffers.capacity * used
        ids = buffers.vector("topk_ids", self._pairs, most, torch.int32)
        weights = buffers.vector("topk_weights", self._pairs, most, torch.float32)
        norm, scale = experts.weights_norm, experts.weights_scale
        self._ops.route(logits, ids.view(tokens, used), weights.view(tokens, used), norm=norm, scale=scale)
        routing = self._tables.routing(layer)
        lowering.stream.copy(torch.from_numpy(routing.ids)[: self._pairs], ids)
        lowering.stream.copy(torch.from_numpy(routing.weights)[: self._pairs], weights)
        if not is_resident:
            lowering.copy_out("normed", lowering.normed.shape[1])
        lowering.side.signal()

    def _shared(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the shared expert makes of `normed`, and its gate; None where there is none."""
        lowering = self._lowering
        if layer.ffn_gate_inp_shexp is None:
            return None
        parts = [Linear.of(layer, "ffn_gate_shexp"), Linear.of(layer, "ffn_up_shexp")]
        gate_up = lowering.matrix("shared_gate_up", sum(part.weight.shape[0] for part in parts))
        lowering.linear(lowering.normed, parts, gate_up)
        shared = lowering.matrix("shared", lowering.delta.shape[1])
        lowering.linear(lowering.gate(gate_up), [Linear.of(layer, "ffn_down_shexp")], shared)
        gate = lowering.matrix("shared_gate", 1)
        lowering.linear(lowering.normed, [Linear(layer.ffn_gate_inp_shexp)], gate)
        return shared, gate

    def _outputs(self, layer: Layer, stacks: tuple[GpuMatrix, ...], *, few: bool) -> torch.Tensor:
        """A row for every pair of the GPU."""
        lowering, layout = self._lowering, self._layout
        host = torch.from_numpy(self._tables.array)
        lowering.stream.copy(self._numbers, host[: layout.length])
        inputs = self._matrix("pairs_normed", lowering.normed.shape[1])
        self._ops.gather_rows(lowering.normed, self._tokens(), inputs)
        outputs = self._matrix("pairs_down", stacks[2].rows)
        self._products(layer, stacks, inputs, outputs, self._segments(layout.resident))
        if self._gpu_experts.may_bring(layer.index, few=few):
            lowering.side.wait_brought()
            self._products(layer, stacks, inputs, outputs, self._segments(layout.brought))
        return outputs

    def _products(
        self,
        layer: Layer,
        stacks: tuple[GpuMatrix, ...],
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        segments: torch.Tensor,
    ) -> None:
        """The experts of the segments; rows of other pairs are left as they are in `outputs`."""
        vector = self._lowering.gpu.weights.vector
        scales = [
            None if tensor is None else vector(tensor)
            for tensor in (layer.ffn_gate_exps_scale, layer.ffn_up_exps_scale, layer.ffn_down_exps_scale)
        ]
        gate, up, down = stacks
        gate_up = self._matrix("pairs_gate_up", gate.rows + up.rows)
        self._ops.expert_matmul(inputs, gate, segments, gate_up[:, : gate.rows], scales=scales[0])
        self._ops.expert_matmul(inputs, up, segments, gate_up[:, gate.rows :], scales=scales[1])
        inner = self._lowering.gate(gate_up)
        self._ops.expert_matmul(inner, down, segments, outputs, scales=scales[2])

    def _matrix(self, name: str, columns: int) -> torch.Tensor:
        """A row for every pair."""
        buffers = self._lowering.gpu.buffers
        return buffers.matrix(name, self._pairs, columns, most=buffers.capacity * self._experts.used_count)

    def _segments(self, start: int) -> torch.Tensor:
        return self._numbers[start : start + SEGMENT * self._layout.segments].view(-1, SEGMENT)

    def _tokens(self) -> torch.Tensor:
        return self._numbers[self._layout.tokens : self._layout.tokens + self._pairs]

    def _weights(self) -> torch.Tensor:
        return self._numbers[self._layout.weights : self._layout.weights + self._pairs].view(torch.float32)


def _zero(x: torch.Tensor) -> None:
    x.zero_()
