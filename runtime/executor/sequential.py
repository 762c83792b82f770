"""The reference forward pass: one layer after the other, one sequence after the other, in float32.

Plain and obviously right rather than fast; it interprets a `Model` as its description says (`architectures/base.py`).
Knows nothing about architectures' names, plans or sampling.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import gelu, silu

from offload.errors import ModelFormatError
from offload.gguf import TensorInfo
from offload.kv import KVCache
from runtime.architectures.base import Activation, Experts, Layer, Model, QKNorm, Rope, RopeOrder
from runtime.executor import layers as nn
from runtime.executor.base import LogitsWanted, Step, checked_caches
from runtime.executor.rotary import RotaryTable
from runtime.weights import Weights

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: silu,
    Activation.GELU: lambda x: gelu(x, approximate="tanh"),
}
_ROTATIONS = {RopeOrder.NORM: nn.rotate_neighbours, RopeOrder.NEOX: nn.rotate_halves}

_Angles = dict[Rope, tuple[torch.Tensor, torch.Tensor]]


class SequentialExecutor:
    """Runs `model` with `weights` on `device`; caches hold `kv_dtype`, everything is computed in float32."""

    def __init__(
        self,
        model: Model,
        weights: Weights,
        *,
        device: torch.device | str = "cpu",
        kv_dtype: torch.dtype = torch.float16,
    ) -> None:
        self.model = model
        self._weights = weights
        self._device = torch.device(device)
        self._kv_dtype = kv_dtype
        self._activation = _ACTIVATIONS[model.activation]
        self._tables: dict[tuple[Rope, TensorInfo | None], RotaryTable] = {}
        self._ropes = tuple(dict.fromkeys(layer.rope for layer in model.layers))

    def new_kv(self, capacity_tokens: int) -> KVCache:
        """See `Executor`."""
        model = self.model
        shape = (model.head_count_kv, model.key_length, model.value_length)
        return KVCache([shape] * model.block_count, capacity_tokens, self._kv_dtype, self._device)

    def close(self) -> None:
        """See `Executor`."""
        self._tables.clear()

    @torch.inference_mode()
    def forward(self, steps: Sequence[Step], *, logits: LogitsWanted = "last") -> list[NDArray[np.float32]]:
        """See `Executor`."""
        caches = checked_caches(steps, KVCache, self.model.vocab_size)
        starts = [kv.length for kv in caches]
        try:
            for kv, start in zip(caches, starts, strict=True):
                kv.truncate(start)  # what a pass that failed half way may have left
            angles = [self._angles(step, start) for step, start in zip(steps, starts, strict=True)]
            hidden = [self._embed(step.token_ids) for step in steps]
            for layer in self.model.layers:
                for index, kv in enumerate(caches):
                    hidden[index] = self._layer(layer, hidden[index], kv, angles[index])
            return [self._logits(x, logits) for x in hidden]
        except BaseException:
            for kv, start in zip(caches, starts, strict=True):
                kv.truncate(start)
            raise

    def _angles(self, step: Step, start: int) -> _Angles:
        """Sines and cosines of the step's positions, for each way that layers turn."""
        angles: _Angles = {}
        for rope in self._ropes:
            factors = rope.factors(step.kv.capacity_tokens)
            table = self._tables.get((rope, factors))
            if table is None:
                divisors = None if factors is None else self._divisors(factors)
                table = self._tables[rope, factors] = RotaryTable(rope, divisors)
            cos, sin = table.at(start, start + len(step.token_ids))
            angles[rope] = self._on_device(cos), self._on_device(sin)
        return angles

    def _on_device(self, table: NDArray[np.float32]) -> torch.Tensor:
        """(tokens, 1, pairs): the same for every head."""
        return torch.from_numpy(table)[:, None].to(self._device)

    def _divisors(self, factors: TensorInfo) -> NDArray[np.float32]:
        divisors: NDArray[np.float32] = self._weights.matrix(factors).cpu().numpy()
        if not (divisors > 0).all():
            raise ModelFormatError(
                f"tensor {factors.name} divides angles by numbers that are not above 0",
                hint="the file is damaged or was converted wrongly",
            )
        return divisors

    def _embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        rows = self._weights.rows(self.model.token_embd, token_ids)
        return rows if self.model.embedding_scale == 1.0 else rows * self.model.embedding_scale

    def _layer(self, layer: Layer, x: torch.Tensor, kv: KVCache, angles: _Angles) -> torch.Tensor:
        """x (tokens, embedding) after one block."""
        attended = self._attention(layer, self._norm(x, layer.attn_norm), kv, angles[layer.rope])
        x = x + self._norm(attended, layer.post_attention_norm)
        normed = self._norm(x, layer.ffn_norm)
        experts = self.model.experts
        fed = self._ffn(layer, normed) if experts is None else self._moe(layer, experts, normed)
        return x + self._norm(fed, layer.post_ffw_norm)

    def _attention(
        self, layer: Layer, x: torch.Tensor, kv: KVCache, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        model = self.model
        queries, keys, values = self._queries_keys_values(layer, x)
        if model.qk_norm is QKNorm.ROW:
            queries, keys = self._norm(queries, layer.attn_q_norm), self._norm(keys, layer.attn_k_norm)
        queries = queries.view(len(x), model.head_count, model.key_length)
        keys = keys.view(len(x), model.head_count_kv, model.key_length)
        if model.qk_norm is QKNorm.HEAD:
            queries, keys = self._norm(queries, layer.attn_q_norm), self._norm(keys, layer.attn_k_norm)
        rotate = _ROTATIONS[layer.rope.order]
        kv.append(layer.index, rotate(keys, *angles), values.view(len(x), model.head_count_kv, model.value_length))
        attended = nn.attention(
            rotate(queries, *angles),
            kv.keys(layer.index),
            kv.values(layer.index),
            scale=model.attention_scale,
            window=layer.sliding_window,
            softcap=model.attention_softcap,
        )
        flat = self._norm(attended.reshape(len(x), -1), layer.attn_sub_norm)
        return self._linear(flat, layer.attn_output, layer.attn_output_scale, layer.attn_output_bias)

    def _queries_keys_values(self, layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each (tokens, heads * length)."""
        model = self.model
        if layer.attn_qkv is not None:
            fused = self._linear(x, layer.attn_qkv, layer.attn_qkv_scale, layer.attn_qkv_bias)
            kv_heads = model.head_count_kv
            widths = [model.head_count * model.key_length, kv_heads * model.key_length, kv_heads * model.value_length]
            queries, keys, values = torch.split(fused, widths, dim=-1)
            return queries, keys, values
        return (
            self._linear(x, layer.attn_q, layer.attn_q_scale, layer.attn_q_bias),
            self._linear(x, layer.attn_k, layer.attn_k_scale, layer.attn_k_bias),
            self._linear(x, layer.attn_v, layer.attn_v_scale, layer.attn_v_bias),
        )

    def _ffn(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        up = self._linear(x, layer.ffn_up, layer.ffn_up_scale, layer.ffn_up_bias)
        if layer.ffn_gate is None:
            gate, up = up.chunk(2, dim=-1)
        else:
            gate = self._linear(x, layer.ffn_gate, layer.ffn_gate_scale, layer.ffn_gate_bias)
        inner = self._norm(self._activation(gate) * up, layer.ffn_sub_norm)
        return self._linear(inner, layer.ffn_down, layer.ffn_down_scale, layer.ffn_down_bias)

    def _moe(self, layer: Layer, experts: Experts, x: torch.Tensor) -> torch.Tensor:
        """The chosen experts' outputs, weighted and summed, and the shared expert's."""
        router_logits = self._linear(x, layer.ffn_gate_inp)
        topk_ids, topk_weights = nn.choose_experts(
            router_logits, experts.used_count, norm=experts.weights_norm, scale=experts.weights_scale
        )
        out = torch.zeros_like(x)
        for expert in sorted(set(topk_ids.flatten().tolist())):
            tokens, slots = torch.where(topk_ids == expert)
            weighted = self._expert(layer, expert, x[tokens]) * topk_weights[tokens, slots, None]
            out.index_add_(0, tokens, weighted)
        if layer.ffn_gate_inp_shexp is not None:
            gate = self._linear(x, layer.ffn_gate_shexp, layer.ffn_gate_shexp_scale)
            up = self._linear(x, layer.ffn_up_shexp, layer.ffn_up_shexp_scale)
            shared = self._linear(self._activation(gate) * up, layer.ffn_down_shexp, layer.ffn_down_shexp_scale)
            out += shared * torch.sigmoid(x @ self._weights.matrix(layer.ffn_gate_inp_shexp).reshape(-1, 1))
        return out

    def _expert(self, layer: Layer, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate = self._linear(x, layer.ffn_gate_exps, layer.ffn_gate_exps_scale, expert=expert)
        up = self._linear(x, layer.ffn_up_exps, layer.ffn_up_exps_scale, expert=expert)
        inner = self._activation(gate) * up
        return self._linear(inner, layer.ffn_down_exps, layer.ffn_down_exps_scale, expert=expert)

    def _logits(self, x: torch.Tensor, wanted: LogitsWanted) -> NDArray[np.float32]:
        model = self.model
        x = x[-1:] if wanted == "last" else x[:0] if wanted == "none" else x
        if not len(x):
            return np.empty((0, model.vocab_size), np.float32)
        logits = self._linear(self._norm(x, model.output_norm), model.output, model.output_scale, model.output_bias)
        if model.logit_softcap is not None:
            logits = torch.tanh(logits / model.logit_softcap) * model.logit_softcap
        array: NDArray[np.float32] = logits.cpu().numpy()
        return array

    def _norm(self, x: torch.Tensor, weight: TensorInfo | None) -> torch.Tensor:
        if weight is None:
            return x
        return nn.rms_norm(x, self._weights.matrix(weight), self.model.norm_eps)

    def _linear(
        self,
        x: torch.Tensor,
        weight: TensorInfo | None,
        scale: TensorInfo | None = None,
        bias: TensorInfo | None = None,
        *,
        expert: int | None = None,
    ) -> torch.Tensor:
        """x (tokens, inputs) times the matrix, its factor and plus its bias: (tokens, outputs)."""
        assert weight is not None, "a checked description has every matrix that its layers use"
        y = self._weights.product(x, weight, expert)
        if scale is not None:
            y = y * self._weights.matrix(scale).reshape(-1)[expert or 0]
        return y if bias is None else y + self._weights.matrix(bias)
