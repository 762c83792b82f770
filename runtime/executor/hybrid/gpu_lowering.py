"""From a step's tasks to the GPU's part of it, recorded: launches, copies, and calls that wait for the CPU's part.

Mirrors `runtime.executor.program.lowering`: a sum into the residual stream is made by the product that yields it where
nothing lies between, else together with the next norm. Knows nothing about when a recording is used.
"""

from collections.abc import Callable, Sequence

import torch

from cpu_kernels.attention import MARKS
from gpu_kernels.operations import Operations
from offload.gguf import TensorInfo
from offload.tiers import Device
from runtime.architectures.base import Layer, QKNorm
from runtime.executor.hybrid.gpu_model import GpuModel
from runtime.executor.hybrid.handover import GpuSide
from runtime.executor.hybrid.recording import Recording
from runtime.executor.hybrid.step_inputs import StepInputs, StepShape
from runtime.executor.hybrid.tasks import Task, Work
from runtime.executor.program.linear import Linear


class GpuLowering:
    """Records steps of one shape on `stream`."""

    def __init__(self, gpu: GpuModel, shape: StepShape, inputs: StepInputs, stream: Recording, side: GpuSide) -> None:
        self.gpu, self.shape, self._inputs, self.stream, self.side = gpu, shape, inputs, stream, side
        self.ops = Operations(stream, gpu.kernels)
        width = gpu.model.embedding_length
        self.x, self.normed, self.delta = (self.matrix(name, width) for name in ("x", "normed", "delta"))
        self._pending: TensorInfo | bool = False  # as in the program's lowering

    def matrix(self, name: str, columns: int) -> torch.Tensor:
        """A row for every token of the step."""
        return self.gpu.buffers.matrix(name, self.shape.tokens, columns)

    def step(self, tasks: Sequence[Task], routed: Callable[[Layer], None] | None) -> None:
        """The GPU's part of all tasks; logits are left out. `routed` does layers of routed experts."""
        if self.gpu.pool.layers:
            self._inputs.send(self.stream)
        for task in tasks:
            if task.work is Work.MOVE:
                self._move(task.device)
            elif task.device is Device.GPU:
                self._do(task, routed)

    def _do(self, task: Task, routed: Callable[[Layer], None] | None) -> None:
        if task.work is Work.ATTENTION:
            self._attention(task.block)
        elif task.work is Work.SPLIT_ATTENTION:
            self._split_attention(task.block)
        elif task.work is Work.FEED_FORWARD:
            self._feed_forward(task.block)
        elif task.work is Work.EXPERTS:
            assert routed is not None, "a model with such tasks has experts"
            routed(task.block)
        elif task.work is Work.OUTPUT:
            self.norm(self.gpu.model.output_norm)

    def _move(self, device: Device) -> None:
        """The residual stream comes here, or goes to the host."""
        if device is Device.GPU:
            self.side.wait()
            self.copy_in("x", self.x.shape[1])
            return
        if self._pending is not False:
            if self._pending is not True:
                self._norm_in_place(self.delta, self._pending)
            self.ops.add(self.x, self.delta)
            self._pending = False
        self.copy_out("x", self.x.shape[1])
        self.side.signal()

    def copy_in(self, name: str, columns: int) -> None:
        """Brings a matrix of the host here."""
        here, there = self.gpu.buffers.shared(name, self.shape.tokens, columns)
        self.stream.copy(here, there)

    def copy_out(self, name: str, columns: int) -> None:
        """Sends a matrix to the host."""
        here, there = self.gpu.buffers.shared(name, self.shape.tokens, columns)
        self.stream.copy(there, here)

    def _attention(self, layer: Layer) -> None:
        gpu, model = self.gpu, self.gpu.model
        qkv, attended = self._queries_keys_values(layer)
        q, k = model.head_count * model.key_length, model.head_count_kv * model.key_length
        queries, keys, values = qkv[:, :q], qkv[:, q : q + k], qkv[:, q + k :]
        norms = self._norm_heads(layer, queries, keys)
        cache = gpu.pool.blocks(layer.index)
        rotation = gpu.angles.rotation(layer.rope, self.shape.capacity_tokens)
        place = (queries, keys, values, self._inputs.positions, rotation, cache, self._inputs.lanes)
        self.ops.heads(*place, query_norm=norms[0], key_norm=norms[1], eps=model.norm_eps)
        is_part = layer.sliding_window in self.shape.part_windows
        marks = self.matrix("marks", MARKS * model.head_count) if is_part else None
        if is_part:  # queries go where the first tokens' keys are, and what is attended there comes back
            self.copy_out("qkv", qkv.shape[1])
            self.side.signal()
        self.ops.attention(
            *(queries, cache, self._inputs.held, attended),
            context=self.shape.context,
            scale=model.attention_scale,
            window=layer.sliding_window,
            softcap=model.attention_softcap,
            marks=marks,
        )
        if marks is not None:
            columns = attended.shape[1] + marks.shape[1]
            self.side.wait()
            self.copy_in("attended_part", columns)
            self.ops.join_parts(attended, marks, self.matrix("attended_part", columns))
        self._attended(layer, attended)

    def _split_attention(self, layer: Layer) -> None:
        """The CPU attends, where keys and values are, while the GPU waits."""
        qkv, attended = self._queries_keys_values(layer)
        self.copy_out("qkv", qkv.shape[1])
        self.side.signal()
        self.side.wait()
        self.copy_in("attended", attended.shape[1])
        self._attended(layer, attended)

    def _queries_keys_values(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of a layer side by side, and where what attention makes of them goes."""
        model = self.gpu.model
        self.norm(layer.attn_norm)
        columns = model.head_count * model.key_length + model.head_count_kv * (model.key_length + model.value_length)
        names = ("attn_q", "attn_k", "attn_v") if layer.attn_qkv is None else ("attn_qkv",)
        qkv = self.matrix("qkv", columns)
        self.linear(self.normed, [Linear.of(layer, name) for name in names], qkv)
        return qkv, self.matrix("attended", model.head_count * model.value_length)

    def _attended(self, layer: Layer, attended: torch.Tensor) -> None:
        if layer.attn_sub_norm is not None:
            self._norm_in_place(attended, layer.attn_sub_norm)
        self._to_residual(attended, Linear.of(layer, "attn_output"), layer.post_attention_norm)

    def _norm_heads(
        self, layer: Layer, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Norms of rows at once; returns the weights of heads' norms, for `Operations.heads`."""
        model, vector = self.gpu.model, self.gpu.weights.vector
        if model.qk_norm is QKNorm.NONE:
            return None, None
        if model.qk_norm is QKNorm.HEAD and layer.attn_q_norm is not None and layer.attn_k_norm is not None:
            return vector(layer.attn_q_norm), vector(layer.attn_k_norm)
        for x, norm in ((queries, layer.attn_q_norm), (keys, layer.attn_k_norm)):
            if norm is not None:
                self._norm_in_place(x, norm, 1 if model.qk_norm is QKNorm.ROW else x.shape[1] // model.key_length)
        return None, None

    def _feed_forward(self, layer: Layer) -> None:
        self.norm(layer.ffn_norm)
        names = ("ffn_up",) if layer.ffn_gate is None else ("ffn_gate", "ffn_up")
        parts = [Linear.of(layer, name) for name in names]
        gate_up = self.matrix("gate_up", sum(part.weight.shape[0] for part in parts))
        self.linear(self.normed, parts, gate_up)
        inner = self.gate(gate_up)
        if layer.ffn_sub_norm is not None:
            self._norm_in_place(inner, layer.ffn_sub_norm)
        self._to_residual(inner, Linear.of(layer, "ffn_down"), layer.post_ffw_norm)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """activation(gate) * up, where the gate's columns come first; written over the gate."""
        width = gate_up.shape[1] // 2
        gate, up = gate_up[:, :width], gate_up[:, width:]
        self.ops.gate(gate, up, gate, activation=self.gpu.model.activation.value)
        return gate

    def linear(self, source: torch.Tensor, parts: Sequence[Linear], out: torch.Tensor, *, adds: bool = False) -> None:
        """out = the products of `source` with the parts, side by side; `adds`: to what is in `out`."""
        weights = self.gpu.weights
        whole = weights.joined([part.weight for part in parts])
        if whole is not None and all(part.is_plain for part in parts):
            self.ops.matmul(source, whole, out, adds=adds)
            return
        column = 0
        for part in parts:
            matrix = weights.matrix(part.weight)
            bias = None if part.bias is None else weights.vector(part.bias)
            scale = 1.0 if part.scale is None else weights.factor(part.scale)
            target = out[:, column : column + matrix.rows]
            self.ops.matmul(source, matrix, target, adds=adds, scale=scale, bias=bias)
            column += matrix.rows

    def norm(self, weight: TensorInfo) -> None:
        """normed = norm of x, after what is still to be added to x."""
        eps, vector = self.gpu.model.norm_eps, self.gpu.weights.vector
        if self._pending is False:
            self.ops.rms_norm(self.x, vector(weight), self.normed, eps=eps)
            return
        post = None if self._pending is True else vector(self._pending)
        self.ops.add_norm(self.x, self.delta, vector(weight), self.normed, eps=eps, delta_weight=post)
        self._pending = False

    def add_later(self, post_norm: TensorInfo | None) -> None:
        """`delta`, or its norm, is to be added to x."""
        self._pending = post_norm or True

    def _norm_in_place(self, x: torch.Tensor, weight: TensorInfo, heads: int = 1) -> None:
        self.ops.rms_norm(x, self.gpu.weights.vector(weight), x, eps=self.gpu.model.norm_eps, heads=heads)

    def _to_residual(self, source: torch.Tensor, linear: Linear, post_norm: TensorInfo | None) -> None:
        """x += norm of the product."""
        if linear.is_plain and post_norm is None:
            self.linear(source, [linear], self.x, adds=True)
            return
        self.linear(source, [linear], self.delta)
        self.add_later(post_norm)
