"""The tensors of one block: which there must be, which there may be, and their shapes.

Knows nothing about tensors outside blocks or how a block is computed.
"""

from dataclasses import dataclass

from offload.gguf import TensorInfo
from runtime.architectures.base import Experts, Layer, QKNorm, Rope
from runtime.architectures.family import Family
from runtime.architectures.hyperparameters import Hyperparameters
from runtime.architectures.tensors import TensorTable

Tensors = dict[str, TensorInfo | None]


@dataclass(frozen=True, slots=True)
class Block:
    """Block `index` of a file; errors as `TensorTable.required`."""

    index: int
    table: TensorTable
    params: Hyperparameters
    family: Family
    experts: Experts | None

    def layer(self, rope: Rope, sliding_window: int | None) -> Layer:
        """Its description."""
        width = self.params.embedding_length
        attended = self.params.head_count * self.params.value_length
        return Layer(
            index=self.index,
            rope=rope,
            sliding_window=sliding_window,
            attn_norm=self._norm("attn_norm", width),
            attn_output=self._weight("attn_output", (width, attended)),
            ffn_norm=self._norm("ffn_norm", width),
            **self._companions("attn_output", width),
            **self._projections(),
            **self._norms(attended),
            **(self._experts(self.experts) if self.experts else self._ffn(self.params.feed_forward_length)),
        )

    def _projections(self) -> Tensors:
        params = self.params
        rows = {
            "attn_q": params.head_count * params.key_length,
            "attn_k": params.head_count_kv * params.key_length,
            "attn_v": params.head_count_kv * params.value_length,
        }
        if self.family.fused_qkv:
            fused = self._matrix("attn_qkv", sum(rows.values()), params.embedding_length, required=False)
            if fused["attn_qkv"] is not None:
                return fused
        return {k: v for name in rows for k, v in self._matrix(name, rows[name], params.embedding_length).items()}

    def _norms(self, attended: int) -> Tensors:
        params = self.params
        norms: Tensors = {}
        if self.family.qk_norm is not QKNorm.NONE:
            by_row = self.family.qk_norm is QKNorm.ROW
            norms["attn_q_norm"] = self._norm("attn_q_norm", params.key_length * (params.head_count if by_row else 1))
            norms["attn_k_norm"] = self._norm(
                "attn_k_norm", params.key_length * (params.head_count_kv if by_row else 1)
            )
        if self.family.sub_norms:
            norms["attn_sub_norm"] = self._norm("attn_sub_norm", attended)
            norms["ffn_sub_norm"] = self._norm("ffn_sub_norm", params.feed_forward_length)
        if self.family.post_norms:
            norms["post_attention_norm"] = self._norm("post_attention_norm", params.embedding_length)
            norms["post_ffw_norm"] = self._norm("post_ffw_norm", params.embedding_length)
        return norms

    def _ffn(self, width: int, suffix: str = "") -> Tensors:
        embedding = self.params.embedding_length
        if self.family.fused_gate_up:
            return self._matrix("ffn_up", 2 * width, embedding) | self._matrix("ffn_down", embedding, width)
        return (
            self._matrix(f"ffn_gate{suffix}", width, embedding)
            | self._matrix(f"ffn_up{suffix}", width, embedding)
            | self._matrix(f"ffn_down{suffix}", embedding, width)
        )

    def _experts(self, experts: Experts) -> Tensors:
        embedding, width, count = self.params.embedding_length, experts.feed_forward_length, experts.count
        tensors: Tensors = {"ffn_gate_inp": self._weight("ffn_gate_inp", (count, embedding))}
        for name, shape in (
            ("ffn_gate_exps", (count, width, embedding)),
            ("ffn_up_exps", (count, width, embedding)),
            ("ffn_down_exps", (count, embedding, width)),
        ):
            tensors[name] = self._weight(name, shape)
            tensors[f"{name}_scale"] = self._optional(f"{name}.scale", (count,))
        if experts.shared_feed_forward_length:
            tensors["ffn_gate_inp_shexp"] = self._weight("ffn_gate_inp_shexp", (1, embedding))
            tensors |= self._ffn(experts.shared_feed_forward_length, "_shexp")
        return tensors

    def _matrix(self, name: str, rows: int, columns: int, *, required: bool = True) -> Tensors:
        weight = self._weight(name, (rows, columns)) if required else self._optional(f"{name}.weight", (rows, columns))
        return {name: weight} | (self._companions(name, rows) if weight is not None else {})

    def _companions(self, name: str, rows: int) -> Tensors:
        companions = {f"{name}_scale": self._optional(f"{name}.scale", (1,))}
        if name in self.family.biases:
            companions[f"{name}_bias"] = self._optional(f"{name}.bias", (rows,))
        return companions

    def _norm(self, name: str, width: int) -> TensorInfo:
        return self._weight(name, (width,))

    def _weight(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        return self.table.required(f"blk.{self.index}.{name}.weight", shape)

    def _optional(self, name: str, shape: tuple[int, ...]) -> TensorInfo | None:
        return self.table.optional(f"blk.{self.index}.{name}", shape)
