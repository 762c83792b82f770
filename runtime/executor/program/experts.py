"""Rows of operations for a layer of routed experts. Knows nothing about how a step is run."""

from dataclasses import dataclass

from cpu_kernels.activations import ActivationBuffer
from cpu_kernels.elementwise import add_gated_row, rms_norm_row
from cpu_kernels.experts import (
    expert_matmul_row,
    most_columns,
    most_segments,
    quantize_slots_row,
    scale_slots_row,
    segments_row,
    streamed_matmul_row,
)
from cpu_kernels.matrix import Matrix
from cpu_kernels.program import Row, times
from cpu_kernels.router import combine_row, gather_row, group_row, route_row
from offload.gguf import TensorInfo
from runtime.architectures.base import Experts, Layer
from runtime.executor.program.emitter import Emitter
from runtime.executor.program.linear import Linear
from runtime.executor.program.parameters import SEGMENTS, TOKENS
from runtime.executor.program.routing import Routing
from runtime.panel import Panel, joined


@dataclass(frozen=True, slots=True)
class RoutingTables:
    """Addresses of what a layer's router decided and of its pairs by expert: see `cpu_kernels.router`."""

    topk_ids: int
    topk_weights: int
    offsets: int
    slot_of_pair: int
    token_of_slot: int

    @classmethod
    def of(cls, emitter: Emitter, layer: Layer, experts: Experts) -> "RoutingTables":
        """Those of a layer; but for the routing that is kept, they are shared by all layers."""
        workspace, pairs = emitter.workspace, emitter.capacity * experts.used_count
        routing = Routing(workspace, pairs, layer.index if emitter.keeps_routing else None)
        return cls(
            int(routing.ids.ctypes.data),
            int(routing.weights.ctypes.data),
            workspace.integers("expert_offsets", experts.count + 1),
            workspace.integers("slot_of_pair", pairs),
            workspace.integers("token_of_slot", pairs),
        )


def add_expert_share(emitter: Emitter, layer: Layer, experts: Experts, *, normed: Matrix, out: Matrix) -> None:
    """out = what those of a token's experts make of `normed` that `expert_split.split_row` left in the layer's tables.

    The shared expert is left out.
    """
    _Experts(emitter, layer, experts).add_share(normed, out)


def add_experts(emitter: Emitter, layer: Layer, experts: Experts, *, normed: Matrix, out: Matrix) -> None:
    """out = what the chosen experts and the shared one make of `normed`."""
    _Experts(emitter, layer, experts).add(normed, out)
    if layer.ffn_gate_inp_shexp is not None:
        _add_shared(emitter, layer, normed, out)


class _Experts:
    """The tables and rows of one layer; tables are shared by all layers."""

    def __init__(self, emitter: Emitter, layer: Layer, experts: Experts) -> None:
        self.emitter = emitter
        self.layer = layer
        self.experts = experts
        workspace, capacity = emitter.workspace, emitter.capacity
        self.slots = capacity * experts.used_count
        self.tile_columns = self._tile_columns()
        self.columns = most_columns(capacity, experts.used_count, experts.count, self.tile_columns)
        segments = most_segments(capacity, experts.used_count, experts.count)
        self.tables = RoutingTables.of(emitter, layer, experts)
        self.segments = workspace.integers("segments", 4 * segments)

    def _tile_columns(self) -> int:
        """The greatest tile of the layer's matrices: what begins on it begins on all."""
        layer, weights = self.layer, self.emitter.weights
        tensors = (layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps)
        return max(weights.panel(tensor).form.isa.tile_columns for tensor in tensors if tensor is not None)

    def add(self, normed: Matrix, out: Matrix) -> None:
        """Router, gate and up, down, and the weighted sum."""
        emitter, used, tables = self.emitter, self.experts.used_count, self.tables
        self._add_routing(normed)
        self._add_segments()
        inputs = emitter.workspace.matrix("slots_normed", self.slots, normed.columns)
        slots = times(TOKENS, used)
        emitter.program.add(gather_row(inputs, normed, tables.token_of_slot, slots, isa=emitter.isa))
        outputs = self._add_ffn(inputs)
        place = (out, outputs, tables.topk_weights, tables.slot_of_pair, TOKENS)
        emitter.program.add(combine_row(*place, used=used, isa=emitter.isa))

    def add_share(self, normed: Matrix, out: Matrix) -> None:
        """`add` for pairs that have slots already, some having none."""
        emitter, used, tables = self.emitter, self.experts.used_count, self.tables
        self._add_segments()
        inputs = emitter.workspace.matrix("slots_normed", self.slots, normed.columns)
        slots = times(TOKENS, used)
        emitter.program.add(gather_row(inputs, normed, tables.token_of_slot, slots, isa=emitter.isa))
        outputs = self._add_ffn(inputs)
        place = (out, outputs, tables.topk_weights, tables.slot_of_pair, TOKENS)
        emitter.program.add(combine_row(*place, used=used, isa=emitter.isa))

    def _add_ffn(self, inputs: Matrix) -> Matrix:
        """What the experts make of their slots' inputs."""
        emitter, layer, workspace = self.emitter, self.layer, self.emitter.workspace
        gate, up, down = layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps
        assert gate is not None and up is not None and down is not None, "a checked description has all experts"
        width = gate.shape[1]
        gate_up = workspace.matrix("slots_gate_up", self.slots, 2 * width)
        self._add_products(inputs, [gate, up], gate_up)
        self._add_scale(gate_up.slice(0, width), layer.ffn_gate_exps_scale)
        self._add_scale(gate_up.slice(width, width), layer.ffn_up_exps_scale)
        inner = emitter.gate(gate_up, times(TOKENS, self.experts.used_count))
        outputs = workspace.matrix("slots_down", self.slots, down.shape[1])
        self._add_products(inner, [down], outputs)
        self._add_scale(outputs, layer.ffn_down_exps_scale)
        return outputs

    def _add_routing(self, normed: Matrix) -> None:
        emitter, experts, tables = self.emitter, self.experts, self.tables
        program, used = emitter.program, experts.used_count
        logits = emitter.matrix("router_logits", experts.count)
        emitter.linear(normed, [Linear.of(self.layer, "ffn_gate_inp")], logits)
        program.add(
            route_row(
                *(logits, tables.topk_ids, tables.topk_weights, TOKENS),
                used=used,
                norm=experts.weights_norm,
                scale=experts.weights_scale,
                status=program.status_address,
            )
        )
        program.add(
            group_row(
                *(tables.topk_ids, TOKENS),
                used=used,
                experts=experts.count,
                offsets=tables.offsets,
                slot_of_pair=tables.slot_of_pair,
                token_of_slot=tables.token_of_slot,
            )
        )

    def _add_segments(self) -> None:
        """The table of experts that have slots; those that are not in memory are asked for."""
        emitter, experts = self.emitter, self.experts
        place = (self.tables.offsets, self.segments, SEGMENTS)
        emitter.program.add(segments_row(*place, experts=experts.count, tile_columns=self.tile_columns))
        if emitter.weights.streamed is not None:
            emitter.look_up(self.layer, self.segments, SEGMENTS)
        if emitter.foresees:
            _add_foresight(emitter, self.layer, experts)

    def _add_products(self, source: Matrix, tensors: list[TensorInfo], out: Matrix) -> None:
        emitter = self.emitter
        panels = [emitter.weights.panel(tensor) for tensor in tensors]
        whole = joined(panels)
        inputs = [emitter.workspace.activations(panel.form, panel.columns, self.columns) for panel in panels]
        for buffer in {buffer.address: buffer for buffer in inputs}.values():
            emitter.program.add(quantize_slots_row(source, self.segments, SEGMENTS, buffer))
        column = 0
        for panel, buffer in zip(panels if whole is None else [whole], inputs, strict=False):
            target = out.slice(column, panel.rows)
            emitter.program.add(self._product_row(panel, buffer, target))
            column += panel.rows

    def _product_row(self, panel: Panel, buffer: ActivationBuffer, out: Matrix) -> Row:
        if panel.place is None:
            place = (panel.form, panel.address, panel.expert_bytes, panel.rows, buffer)
            return expert_matmul_row(*place, out=out, segments=self.segments, most=SEGMENTS)
        inputs = (panel.form, panel.address, self.emitter.streamed(panel.place), panel.rows, buffer)
        return streamed_matmul_row(*inputs, out=out, segments=self.segments, most=SEGMENTS)

    def _add_scale(self, x: Matrix, scale: TensorInfo | None) -> None:
        if scale is not None:
            emitter = self.emitter
            row = scale_slots_row(x, emitter.vector(scale), self.segments, SEGMENTS, isa=emitter.isa)
            emitter.program.add(row)


def _add_foresight(emitter: Emitter, layer: Layer, experts: Experts) -> None:
    """Has experts read that the next routed layer would choose if this layer's experts added nothing.

    Its router sees what comes before this layer's experts, so that reads begin while those are computed. A guess that
    is not a number is none: what it says then is of no consequence.
    """
    later = [other for other in emitter.model.layers[layer.index + 1 :] if other.ffn_gate_inp is not None]
    streamed = emitter.weights.streamed
    if not later or streamed is None:
        return
    guessed, workspace, model = later[0], emitter.workspace, emitter.model
    x, normed = (emitter.matrix(name, model.embedding_length) for name in ("x", "guess_normed"))
    address = emitter.vector(guessed.ffn_norm)
    emitter.program.add(rms_norm_row(normed, x, address, TOKENS, eps=model.norm_eps, isa=emitter.isa))
    logits = emitter.matrix("guess_logits", experts.count)
    emitter.linear(normed, [Linear.of(guessed, "ffn_gate_inp")], logits)
    pairs = emitter.capacity * experts.used_count
    ids, unused = workspace.integers("guess_ids", pairs), workspace.integers("guess_weights", pairs)
    status = workspace.integers("guess_status", 2)
    place = (logits, ids, unused, TOKENS)
    emitter.program.add(route_row(*place, used=experts.used_count, norm=False, scale=1.0, status=status))
    cache = streamed.cache
    emitter.program.add(
        cache.slots.foresee_row(
            *(streamed.layer_number(guessed.index), ids, TOKENS),
            used=experts.used_count,
            current=streamed.layer_number(layer.index),
            status=emitter.program.status_address,
            foresee=cache.foresee,
        )
    )


def _add_shared(emitter: Emitter, layer: Layer, normed: Matrix, out: Matrix) -> None:
    """out += shared expert * sigmoid(its gate)."""
    parts = [Linear.of(layer, "ffn_gate_shexp"), Linear.of(layer, "ffn_up_shexp")]
    gate_up = emitter.matrix("shared_gate_up", sum(part.weight.shape[0] for part in parts))
    emitter.linear(normed, parts, gate_up)
    inner = emitter.gate(gate_up, TOKENS)
    shared = emitter.matrix("shared", emitter.model.embedding_length)
    emitter.linear(inner, [Linear.of(layer, "ffn_down_shexp")], shared)
    gate = emitter.matrix("shared_gate", 1)
    assert layer.ffn_gate_inp_shexp is not None
    emitter.linear(normed, [Linear(layer.ffn_gate_inp_shexp)], gate)
    emitter.program.add(add_gated_row(out, out, shared, gate, TOKENS, isa=emitter.isa))
