"""Rows of operations for the parts that every kind of layer is made of: products, norms, gates.

Knows the model's weights and the workspace, nothing about the order in which a layer uses them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpu_kernels.activations import quantize_row
from cpu_kernels.elementwise import gate_row, rms_norm_row, scale_bias_row
from cpu_kernels.experts import Streamed, slot_matmul_row
from cpu_kernels.matmul import matmul_row
from cpu_kernels.matrix import Matrix
from cpu_kernels.program import Field, Program
from offload.gguf import TensorInfo
from runtime.architectures.base import Layer, Model
from runtime.executor.program.linear import Linear
from runtime.executor.program.parameters import TOKENS
from runtime.executor.program.workspace import Workspace
from runtime.panel import Panel, SlotPart, joined
from runtime.panels import PanelWeights


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows of float32 that are multiplied: where they are, how many, and how many there may be."""

    source: Field
    stride_bytes: int
    tokens: Field
    capacity: int


class Emitter:
    """Appends rows to a program for up to `capacity` tokens.

    `keeps_routing`: every layer's routing stays in memory of its own (`Routing`) until the next run. `foresees`: what
    the next layer's experts may be is guessed early, so that they can be read ahead.
    """

    def __init__(
        self,
        model: Model,
        weights: PanelWeights,
        workspace: Workspace,
        capacity: int,
        *,
        keeps_routing: bool = False,
        foresees: bool = False,
    ) -> None:
        self.model = model
        self.weights = weights
        self.workspace = workspace
        self.capacity = capacity
        self.keeps_routing = keeps_routing
        self.foresees = foresees
        self.isa = weights.isa
        self.program = Program()

    def matrix(self, name: str, columns: int) -> Matrix:
        """A matrix of the workspace with a row for every token."""
        return self.workspace.matrix(name, self.capacity, columns)

    def vector(self, tensor: TensorInfo) -> int:
        """The address of a vector of weights."""
        return int(self.weights.vector(tensor).ctypes.data)

    def look_up(self, layer: Layer, segments: int, most: Field) -> None:
        """Has the experts of the segments brought, those of them that are not there."""
        streamed = self.weights.streamed
        assert streamed is not None, "only streamed weights are looked up"
        cache, number = streamed.cache, streamed.layer_number(layer.index)
        options = {"dense_from": cache.dense_from, "status": self.program.status_address}
        self.program.add(cache.slots.lookup_row(number, segments, most, **options, miss=cache.fetch))

    def look_up_matrices(self, layer: Layer) -> None:
        """Has the layer's matrices brought, if they are streamed."""
        if self.weights.streamed is not None and self.model.experts is None:
            segment = np.array([0, 0, 1, 0], np.int32)  # all tokens use the only expert
            self.program.keep(segment)
            self.look_up(layer, int(segment.ctypes.data), 1)

    def streamed(self, place: SlotPart) -> Streamed:
        """A part of a slot as rows of this program wait for it."""
        return Streamed(place.slots, place.layer, place.part, self.program.status_address)

    def linear(self, source: Matrix, parts: Sequence[Linear], out: Matrix, *, adds: bool = False) -> None:
        """out = the products of `source` with the parts, side by side; `adds`: to what is in `out`."""
        self.products(Inputs(source.address, source.stride_bytes, TOKENS, self.capacity), parts, out, adds=adds)

    def products(self, inputs: Inputs, parts: Sequence[Linear], out: Matrix, *, adds: bool = False) -> None:
        """`linear` for any rows."""
        panels = [self.weights.panel(part.weight) for part in parts]
        whole = joined(panels)
        buffers = [self.workspace.activations(panel.form, panel.columns, inputs.capacity) for panel in panels]
        for buffer in {buffer.address: buffer for buffer in buffers}.values():
            self.program.add(quantize_row(inputs.source, inputs.stride_bytes, inputs.tokens, buffer))
        column = 0
        for panel, buffer in zip(panels if whole is None else [whole], buffers, strict=False):
            place = (panel.form, panel.address, panel.rows, panel.columns, buffer)
            target = (out.address + 4 * column, out.stride_bytes)
            tokens = inputs.tokens if panel.place is None else 0
            row = matmul_row(*place, *target, tokens, adds=adds, keep=(self.weights,))
            if panel.place is not None:
                row = slot_matmul_row(row, self.streamed(panel.place), inputs.tokens, isa=panel.form.isa)
            self.program.add(row)
            column += panel.rows
        self._scales_and_biases(parts, panels, out, inputs.tokens)

    def gate(self, gate_up: Matrix, tokens: Field) -> Matrix:
        """activation(gate) * up, where the gate's columns come first; written over the gate."""
        width = gate_up.columns // 2
        gate, up = gate_up.slice(0, width), gate_up.slice(width, width)
        self.program.add(gate_row(gate, gate, up, tokens, activation=self.model.activation.value, isa=self.isa))
        return gate

    def norm_in_place(self, x: Matrix, weight: TensorInfo | None, *, heads: int = 1) -> None:
        """x = norm of x, if there is one."""
        if weight is not None:
            eps = self.model.norm_eps
            self.program.add(rms_norm_row(x, x, self.vector(weight), TOKENS, eps=eps, heads=heads, isa=self.isa))

    def _scales_and_biases(self, parts: Sequence[Linear], panels: Sequence[Panel], out: Matrix, tokens: Field) -> None:
        if all(part.is_plain for part in parts):
            return
        if all(part.scale is None for part in parts):
            biases = [
                np.zeros(panel.rows, np.float32) if part.bias is None else self.weights.vector(part.bias)
                for part, panel in zip(parts, panels, strict=True)
            ]
            bias = np.concatenate(biases)
            row = scale_bias_row(out, tokens, bias=int(bias.ctypes.data), isa=self.isa)
            self.program.add(replace(row, keep=(bias,)))
            return
        column = 0
        for part, panel in zip(parts, panels, strict=True):
            if not part.is_plain:
                scale = 1.0 if part.scale is None else float(self.weights.vector(part.scale)[0])
                address = None if part.bias is None else self.vector(part.bias)
                target = out.slice(column, panel.rows)
                self.program.add(scale_bias_row(target, tokens, scale=scale, bias=address, isa=self.isa))
            column += panel.rows
