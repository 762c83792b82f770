"""From a model's description to a program: the rows of operations that take a step's tokens through all layers.

Knows nothing about architectures' names, files or threads. What differs between steps is a parameter of the program
(`Name`); what layers pass on lies in a `Workspace`. A sum into the residual stream x is made by the product that
yields it where nothing lies between, else together with the next norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpu_kernels.activations import quantize_row
from cpu_kernels.attention import attention_row, partial_floats, split_attention_rows, tile_tokens
from cpu_kernels.elementwise import add_norm_row, gate_row, rms_norm_row, scale_bias_row, softcap_row
from cpu_kernels.heads import Rotation, heads_row
from cpu_kernels.kv_layout import KVLayout, KVMemory
from cpu_kernels.matmul import matmul_row
from cpu_kernels.matrix import Matrix
from cpu_kernels.program import Field, Parameter, Program
from offload.gguf import TensorInfo
from runtime.architectures.base import Layer, Model, QKNorm, Rope, RopeOrder
from runtime.executor.program.experts import add_experts
from runtime.executor.program.kv import layer_bytes
from runtime.executor.program.linear import Linear
from runtime.executor.program.parameters import TOKENS, WANTED, Name
from runtime.executor.program.workspace import Workspace
from runtime.panels import Panel, PanelWeights, joined


class Lowering:
    """Writes one program for up to `capacity` tokens, of which `logits_capacity` get logits."""

    def __init__(
        self, model: Model, weights: PanelWeights, workspace: Workspace, *, capacity: int, logits_capacity: int
    ) -> None:
        self.model = model
        self.weights = weights
        self.workspace = workspace
        self.capacity = capacity
        self.logits_capacity = logits_capacity
        self.program = Program()
        self.x = workspace.matrix("x", capacity, model.embedding_length)
        self.normed = workspace.matrix("normed", capacity, model.embedding_length)
        self.delta = workspace.matrix("delta", capacity, model.embedding_length)
        self._pending: TensorInfo | bool = False  # whether `delta` is still to be added to x, and the norm before
        self._ropes = list(dict.fromkeys(layer.rope for layer in model.layers))

    def step(self, layouts: Sequence[KVLayout], *, split: bool) -> Program:
        """All layers and the output head for lanes whose caches are laid out so: one lane of any number of tokens, or
        several of one token each. `split`: shares the context of few tokens among the threads.
        """
        for layer in self.model.layers:
            self._attention(layer, layouts, split)
            self._feed_forward(layer)
        self._norm(self.model.output_norm)
        return self.head()

    def head(self) -> Program:
        """The output head alone, of tokens that `normed` holds."""
        model = self.model
        logits = self.workspace.matrix("logits", self.logits_capacity, model.vocab_size)
        linear = Linear(model.output, model.output_scale, model.output_bias)
        source = Parameter(Name.FIRST_WANTED)
        inputs = _Inputs(source, self.normed.stride_bytes, WANTED, self.logits_capacity)
        self._products(inputs, [linear], logits, adds=False)
        if model.logit_softcap is not None:
            self.program.add(softcap_row(logits, WANTED, cap=model.logit_softcap, isa=self.weights.isa))
        return self.program

    def matrix(self, name: str, columns: int) -> Matrix:
        """A matrix of the workspace with a row for every token."""
        return self.workspace.matrix(name, self.capacity, columns)

    def vector(self, tensor: TensorInfo) -> int:
        """The address of a vector of weights."""
        return int(self.weights.vector(tensor).ctypes.data)

    def linear(self, source: Matrix, parts: Sequence[Linear], out: Matrix, *, adds: bool = False) -> None:
        """out = the products of `source` with the parts, side by side; `adds`: to what is in `out`."""
        inputs = _Inputs(source.address, source.stride_bytes, TOKENS, self.capacity)
        self._products(inputs, parts, out, adds=adds)

    def gate(self, gate_up: Matrix, tokens: Field) -> Matrix:
        """activation(gate) * up, where the gate's columns come first; written over the gate."""
        width = gate_up.columns // 2
        gate, up = gate_up.slice(0, width), gate_up.slice(width, width)
        activation = self.model.activation.value
        self.program.add(gate_row(gate, gate, up, tokens, activation=activation, isa=self.weights.isa))
        return gate

    def _attention(self, layer: Layer, layouts: Sequence[KVLayout], split: bool) -> None:
        model = self.model
        self._norm(layer.attn_norm)
        q, k = model.head_count * model.key_length, model.head_count_kv * model.key_length
        v = model.head_count_kv * model.value_length
        names = ("attn_q", "attn_k", "attn_v") if layer.attn_qkv is None else ("attn_qkv",)
        qkv = self.matrix("qkv", q + k + v)
        self.linear(self.normed, [Linear.of(layer, name) for name in names], qkv)
        attended = self.matrix("attended", model.head_count * model.value_length)
        head_norms = self._norm_heads(layer, qkv.slice(0, q), qkv.slice(q, k))
        tokens: Field = TOKENS if len(layouts) == 1 else 1
        for number, layout in enumerate(layouts):
            lane = _Lane(number, layout, tokens, self._ropes.index(layer.rope))
            rows = qkv.rows_from(number)
            queries = rows.slice(0, q)
            self.program.add(
                heads_row(
                    *(queries, rows.slice(q, k), rows.slice(q + k, v), lane.memory(layer), lane.rotation(layer.rope)),
                    tokens=tokens,
                    start=lane.start,
                    query_norm=head_norms[0],
                    key_norm=head_norms[1],
                    eps=model.norm_eps,
                    isa=self.weights.isa,
                )
            )
            self._attend(layer, attended.rows_from(number), queries, lane, split=split)
        self.norm_in_place(attended, layer.attn_sub_norm)
        self._to_residual(attended, Linear.of(layer, "attn_output"), layer.post_attention_norm)

    def _attend(self, layer: Layer, out: Matrix, queries: Matrix, lane: "_Lane", *, split: bool) -> None:
        model, isa, memory = self.model, self.weights.isa, lane.memory(layer)
        scale, window, softcap = model.attention_scale, layer.sliding_window, model.attention_softcap
        if not split:
            self.program.add(
                attention_row(
                    *(out, queries, memory),
                    tokens=lane.tokens,
                    start=lane.start,
                    scale=scale,
                    window=window,
                    softcap=softcap,
                    isa=isa,
                )
            )
            return
        few = tile_tokens(model.head_count, model.head_count_kv)
        floats = partial_floats(model.head_count, memory.layout, few)
        scratch = self.workspace.array(f"pieces_{memory.layout.capacity_tokens}", 1, floats)
        for row in split_attention_rows(
            *(out, queries, memory),
            scratch=int(scratch.ctypes.data),
            tokens=lane.tokens,
            start=lane.start,
            pieces=Parameter(Name.PIECES.of(lane.number)),
            scale=scale,
            window=window,
            softcap=softcap,
            isa=isa,
        ):
            self.program.add(row)

    def _norm_heads(self, layer: Layer, queries: Matrix, keys: Matrix) -> tuple[int | None, int | None]:
        """Norms of rows at once; returns the weights of heads' norms, for `heads_row`."""
        if self.model.qk_norm is QKNorm.NONE:
            return None, None
        norms = ((queries, layer.attn_q_norm), (keys, layer.attn_k_norm))
        if self.model.qk_norm is QKNorm.HEAD and layer.attn_q_norm is not None and layer.attn_k_norm is not None:
            return self.vector(layer.attn_q_norm), self.vector(layer.attn_k_norm)
        for matrix, norm in norms:
            heads = 1 if self.model.qk_norm is QKNorm.ROW else matrix.columns // self.model.key_length
            self.norm_in_place(matrix, norm, heads=heads)
        return None, None

    def _feed_forward(self, layer: Layer) -> None:
        self._norm(layer.ffn_norm)
        if self.model.experts is not None:
            add_experts(self, layer, self.model.experts)
            self._pending = layer.post_ffw_norm or True
            return
        names = ("ffn_up",) if layer.ffn_gate is None else ("ffn_gate", "ffn_up")
        parts = [Linear.of(layer, name) for name in names]
        gate_up = self.matrix("gate_up", sum(part.weight.shape[0] for part in parts))
        self.linear(self.normed, parts, gate_up)
        inner = self.gate(gate_up, TOKENS)
        self.norm_in_place(inner, layer.ffn_sub_norm)
        self._to_residual(inner, Linear.of(layer, "ffn_down"), layer.post_ffw_norm)

    def _norm(self, weight: TensorInfo) -> None:
        """normed = norm of x, after what is still to be added to x."""
        eps, isa = self.model.norm_eps, self.weights.isa
        if self._pending is False:
            self.program.add(rms_norm_row(self.normed, self.x, self.vector(weight), TOKENS, eps=eps, isa=isa))
            return
        post = None if self._pending is True else self.vector(self._pending)
        self.program.add(
            add_norm_row(
                self.x, self.delta, self.normed, self.vector(weight), TOKENS, eps=eps, delta_weight=post, isa=isa
            )
        )
        self._pending = False

    def norm_in_place(self, x: Matrix, weight: TensorInfo | None, *, heads: int = 1) -> None:
        """x = norm of x, if there is one."""
        if weight is not None:
            eps, isa = self.model.norm_eps, self.weights.isa
            self.program.add(rms_norm_row(x, x, self.vector(weight), TOKENS, eps=eps, heads=heads, isa=isa))

    def _to_residual(self, source: Matrix, linear: Linear, post_norm: TensorInfo | None) -> None:
        """x += norm of the product."""
        if linear.is_plain and post_norm is None:
            self.linear(source, [linear], self.x, adds=True)
            return
        self.linear(source, [linear], self.delta)
        self._pending = post_norm or True

    def _products(self, inputs: "_Inputs", parts: Sequence[Linear], out: Matrix, *, adds: bool) -> None:
        panels = [self.weights.panel(part.weight) for part in parts]
        whole = joined(panels)
        tokens = inputs.tokens
        buffers = [self.workspace.activations(panel.form, panel.columns, inputs.capacity) for panel in panels]
        for buffer in {buffer.address: buffer for buffer in buffers}.values():
            self.program.add(quantize_row(inputs.source, inputs.stride_bytes, tokens, buffer))
        column = 0
        for panel, buffer in zip(panels if whole is None else [whole], buffers, strict=False):
            place = (panel.form, panel.address, panel.rows, panel.columns, buffer)
            address = out.address + 4 * column
            self.program.add(matmul_row(*place, address, out.stride_bytes, tokens, adds=adds, keep=(self.weights,)))
            column += panel.rows
        self._scales_and_biases(parts, panels, out, tokens)

    def _scales_and_biases(self, parts: Sequence[Linear], panels: Sequence[Panel], out: Matrix, tokens: Field) -> None:
        if all(part.is_plain for part in parts):
            return
        if all(part.scale is None for part in parts):
            biases = [
                np.zeros(panel.rows, np.float32) if part.bias is None else self.weights.vector(part.bias)
                for part, panel in zip(parts, panels, strict=True)
            ]
            bias = np.concatenate(biases)
            row = scale_bias_row(out, tokens, bias=bias.ctypes.data, isa=self.weights.isa)
            self.program.add(replace(row, keep=(bias,)))
            return
        column = 0
        for part, panel in zip(parts, panels, strict=True):
            if not part.is_plain:
                scale = 1.0 if part.scale is None else float(self.weights.vector(part.scale)[0])
                address = None if part.bias is None else self.vector(part.bias)
                target = out.slice(column, panel.rows)
                self.program.add(scale_bias_row(target, tokens, scale=scale, bias=address, isa=self.weights.isa))
            column += panel.rows


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Rows of float32 that are multiplied: where they are, how many, and how many there may be."""

    source: Field
    stride_bytes: int
    tokens: Field
    capacity: int


@dataclass(frozen=True, slots=True)
class _Lane:
    """What rows need to know of one sequence."""

    number: int
    layout: KVLayout
    tokens: Field
    rope: int

    @property
    def start(self) -> Parameter:
        """The position of its first token."""
        return Parameter(Name.START.of(self.number))

    def memory(self, layer: Layer) -> KVMemory:
        """Where a layer's keys and values lie."""
        name, offset = Name.KV.of(self.number), layer.index * layer_bytes(self.layout)
        keys, values = Parameter(name, offset=offset), Parameter(name, offset=offset + self.layout.key_bytes)
        return KVMemory(self.layout, keys, values)

    def rotation(self, rope: Rope) -> Rotation:
        """How a layer's heads turn."""
        cos, sin = (Parameter(name.of(self.number, self.rope)) for name in (Name.COS, Name.SIN))
        return Rotation(cos, sin, rope.dimension_count // 2, rope.order is RopeOrder.NORM)
