"""From a model's description to a program: the rows of operations that take a step's tokens through all layers.

Knows nothing about architectures' names, files or threads. What differs between steps is a parameter of the program
(`Name`); what layers pass on lies in a `Workspace`. A sum into the residual stream x is made by the product that
yields it where nothing lies between, else together with the next norm.
"""

from collections.abc import Sequence
from functools import partial

from cpu_kernels.attention import part_columns
from cpu_kernels.elementwise import add_norm_row, add_row, rms_norm_row, softcap_row
from cpu_kernels.heads import code_keys_row, heads_row
from cpu_kernels.kv_index import index_row
from cpu_kernels.kv_select import Selection, chosen_bytes, scratch_bytes, select_row
from cpu_kernels.matrix import AnyMatrix, Matrix
from cpu_kernels.program import Parameter, Program
from offload.gguf import TensorInfo
from runtime.architectures.base import Layer, Model, QKNorm
from runtime.executor.program.attending import LaneRows, LayerAttention
from runtime.executor.program.emitter import Emitter, Inputs
from runtime.executor.program.experts import add_experts
from runtime.executor.program.kv_cold import ColdReads
from runtime.executor.program.linear import Linear
from runtime.executor.program.parameters import TOKENS, WANTED, Name
from runtime.executor.program.sequence_layout import SequenceLayout
from runtime.executor.program.workspace import Workspace


class Lowering:
    """Writes the program of `emitter`, whose last `logits_capacity` tokens at most get logits."""

    def __init__(self, emitter: Emitter, logits_capacity: int, cold: ColdReads | None = None) -> None:
        """`cold`: brings what attention sees and RAM does not hold."""
        self._emitter = emitter
        self._cold = cold
        self._model = emitter.model
        self._program = emitter.program
        self._isa = emitter.isa
        self._logits_capacity = logits_capacity
        width = self._model.embedding_length
        self._x, self._normed, self._delta = (emitter.matrix(name, width) for name in ("x", "normed", "delta"))
        self._pending: TensorInfo | bool = False  # whether `delta` is still to be added to x, and the norm before
        self._ropes = list(dict.fromkeys(layer.rope for layer in self._model.layers))

    def step(self, layouts: Sequence[SequenceLayout], *, split: bool) -> Program:
        """All layers and the output head for lanes whose caches are laid out so: one of any number of tokens, or
        several of few each. `split`: shares the context of few tokens among the threads.
        """
        for layer in self._model.layers:
            self._emitter.look_up_matrices(layer)
            self.attention(layer, layouts, split=split)
            self.feed_forward(layer)
        return self.output()

    def output(self) -> Program:
        """The norm of all tokens, and the output head."""
        self._norm(self._model.output_norm)
        return self.head()

    def head(self) -> Program:
        """The output head alone, of tokens that `normed` holds."""
        model = self._model
        logits = self._emitter.workspace.matrix("logits", self._logits_capacity, model.vocab_size)
        linear = Linear(model.output, model.output_scale, model.output_bias)
        source = Parameter(Name.FIRST_WANTED)
        self._emitter.products(
            Inputs(source, self._normed.stride_bytes, WANTED, self._logits_capacity), [linear], logits
        )
        if model.logit_softcap is not None:
            self._program.add(softcap_row(logits, WANTED, cap=model.logit_softcap, isa=self._isa))
        return self._program

    def settle(self) -> None:
        """What is still to be added to x is added, so that x can be read."""
        if self._pending is False:
            return
        if self._pending is not True:
            self._emitter.norm_in_place(self._delta, self._pending)
        self._program.add(add_row(self._x, self._x, self._delta, TOKENS, isa=self._isa))
        self._pending = False

    def attention(self, layer: Layer, layouts: Sequence[SequenceLayout], *, split: bool) -> None:
        """x plus what a layer's attention makes of it; `layouts` and `split` as for `step`."""
        self._norm(layer.attn_norm)
        names = ("attn_q", "attn_k", "attn_v") if layer.attn_qkv is None else ("attn_qkv",)
        qkv, attended = self.attention_matrices()
        self._emitter.linear(self._normed, [Linear.of(layer, name) for name in names], qkv)
        self.attend(layer, layouts, split=split)
        self._emitter.norm_in_place(attended, layer.attn_sub_norm)
        self._to_residual(attended, Linear.of(layer, "attn_output"), layer.post_attention_norm)

    def attention_matrices(self) -> tuple[Matrix, Matrix]:
        """See the function of that name."""
        return attention_matrices(self._model, self._emitter.workspace, self._emitter.capacity)

    def attend(self, layer: Layer, layouts: Sequence[SequenceLayout], *, split: bool) -> None:
        """From one of `attention_matrices` to the other: norms of heads, positions, the cache, and attention."""
        model = self._model
        q, k = model.head_count * model.key_length, model.head_count_kv * model.key_length
        v = model.head_count_kv * model.value_length
        qkv, attended = self.attention_matrices()
        head_norms = self._norm_heads(layer, qkv.slice(0, q), qkv.slice(q, k))
        attention = LayerAttention(self._emitter, layer, self._cold, split=split)
        for number, layout in enumerate(layouts):  # in order: a lane may write over what one before it has put there
            tokens = TOKENS if len(layouts) == 1 else Parameter(Name.COUNT.of(number))
            lane = LaneRows(number, layout, tokens, self._ropes.index(layer.rope))
            rows, out = (lane.rows(name, matrix) for name, matrix in ((Name.QKV, qkv), (Name.ATTENDED, attended)))
            queries = rows.slice(0, q)
            self._program.add(
                heads_row(
                    *(queries, rows.slice(q, k), rows.slice(q + k, v), lane.memory(layer), lane.rotation(layer.rope)),
                    tokens=tokens,
                    start=lane.start,
                    query_norm=head_norms[0],
                    key_norm=head_norms[1],
                    eps=model.norm_eps,
                    isa=self._isa,
                )
            )
            memory = lane.memory(layer)
            if memory.layout.has_window:
                self._program.add(code_keys_row(memory, tokens=tokens, start=lane.start, isa=self._isa))
            chosen = self._choose(layer, queries, lane, apart=bool(attention.runs(lane)))
            attention.add(lane, attention.of(lane, out, queries, chosen=chosen))
        attention.finish()

    def attend_part(self, layer: Layer, layouts: Sequence[SequenceLayout], *, split: bool) -> None:
        """From queries that are turned already to `part_matrix`: what the first pieces of each lane say."""
        model = self._model
        qkv, _ = self.attention_matrices()
        attention = LayerAttention(self._emitter, layer, self._cold, split=split)
        part = part_matrix(model, self._emitter.workspace, self._emitter.capacity)
        for number, layout in enumerate(layouts):
            tokens = TOKENS if len(layouts) == 1 else Parameter(Name.COUNT.of(number))
            lane = LaneRows(number, layout, tokens, self._ropes.index(layer.rope))
            queries = lane.rows(Name.QKV, qkv).slice(0, model.head_count * model.key_length)
            pieces = Parameter(Name.PART_PIECES.of(number))
            attention.add(lane, attention.of(lane, lane.rows(Name.PART, part), queries, part_pieces=pieces))
        attention.finish()

    def _choose(self, layer: Layer, queries: AnyMatrix, lane: LaneRows, *, apart: bool) -> int | None:
        """Keeps a layer's abstracts, and chooses by them; the address of the choices, None where all is read.

        `apart`: choices stay while other lanes choose.
        """
        abstracts = lane.layout.abstracts
        if abstracts is None or abstracts.layers[layer.index] is None or layer.sliding_window is not None:
            return None
        memory, isa, workspace = lane.memory(layer), self._isa, self._emitter.workspace
        index = Parameter(Name.ABSTRACTS.of(lane.number), offset=abstracts.start(layer.index))
        filled = Parameter(Name.FILLED.of(lane.number))
        self._program.add(index_row(memory, index, heads=filled, tokens=lane.tokens, start=lane.start, isa=isa))
        if not lane.layout.budget_tokens:
            return None
        kept = memory.layout
        sizes = {"chosen": self._emitter.capacity * chosen_bytes(kept), "choosing": scratch_bytes(kept)}
        own = f"_{lane.number}" if apart else ""
        chosen, scratch = (
            workspace.integers(f"{name}_{kept.capacity_tokens}{own}", size // 4) for name, size in sizes.items()
        )
        counts = Parameter(Name.CHOICES.of(lane.number), offset=abstracts.counts_start(layer.index))
        selection = Selection(index, chosen, counts, scratch, lane.layout.budget_tokens)
        self._program.add(select_row(queries, kept, selection, tokens=lane.tokens, start=lane.start, isa=isa))
        if self._cold is not None:
            read = partial(self._cold.chosen.read, layer.index, lane.number, chosen)
            self._program.add_call("read_chosen", read)
        return chosen

    def _norm_heads(self, layer: Layer, queries: Matrix, keys: Matrix) -> tuple[int | None, int | None]:
        """Norms of rows at once; returns the weights of heads' norms, for `heads_row`."""
        if self._model.qk_norm is QKNorm.NONE:
            return None, None
        norms = ((queries, layer.attn_q_norm), (keys, layer.attn_k_norm))
        if self._model.qk_norm is QKNorm.HEAD and layer.attn_q_norm is not None and layer.attn_k_norm is not None:
            return self._emitter.vector(layer.attn_q_norm), self._emitter.vector(layer.attn_k_norm)
        for matrix, norm in norms:
            heads = 1 if self._model.qk_norm is QKNorm.ROW else matrix.columns // self._model.key_length
            self._emitter.norm_in_place(matrix, norm, heads=heads)
        return None, None

    def feed_forward(self, layer: Layer) -> None:
        """x plus what a layer's feed-forward or its experts make of it."""
        self._norm(layer.ffn_norm)
        if self._model.experts is not None:
            add_experts(self._emitter, layer, self._model.experts, normed=self._normed, out=self._delta)
            self._pending = layer.post_ffw_norm or True
            return
        names = ("ffn_up",) if layer.ffn_gate is None else ("ffn_gate", "ffn_up")
        parts = [Linear.of(layer, name) for name in names]
        gate_up = self._emitter.matrix("gate_up", sum(part.weight.shape[0] for part in parts))
        self._emitter.linear(self._normed, parts, gate_up)
        inner = self._emitter.gate(gate_up, TOKENS)
        self._emitter.norm_in_place(inner, layer.ffn_sub_norm)
        self._to_residual(inner, Linear.of(layer, "ffn_down"), layer.post_ffw_norm)

    def _norm(self, weight: TensorInfo) -> None:
        """normed = norm of x, after what is still to be added to x."""
        eps, address = self._model.norm_eps, self._emitter.vector(weight)
        x, delta, out = self._x, self._delta, self._normed
        if self._pending is False:
            self._program.add(rms_norm_row(out, x, address, TOKENS, eps=eps, isa=self._isa))
            return
        post = None if self._pending is True else self._emitter.vector(self._pending)
        self._program.add(add_norm_row(x, delta, out, address, TOKENS, eps=eps, delta_weight=post, isa=self._isa))
        self._pending = False

    def _to_residual(self, source: Matrix, linear: Linear, post_norm: TensorInfo | None) -> None:
        """x += norm of the product."""
        if linear.is_plain and post_norm is None:
            self._emitter.linear(source, [linear], self._x, adds=True)
            return
        self._emitter.linear(source, [linear], self._delta)
        self._pending = post_norm or True


def attention_matrices(model: Model, workspace: Workspace, capacity: int) -> tuple[Matrix, Matrix]:
    """Of up to `capacity` tokens queries, keys and values side by side, and what attention makes of them."""
    columns = model.head_count * model.key_length + model.head_count_kv * (model.key_length + model.value_length)
    attended = workspace.matrix("attended", capacity, model.head_count * model.value_length)
    return workspace.matrix("qkv", capacity, columns), attended


def part_matrix(model: Model, workspace: Workspace, capacity: int) -> Matrix:
    """Of up to `capacity` tokens what a part of their context says (`cpu_kernels.attention`)."""
    return workspace.matrix("attended_part", capacity, part_columns(model.head_count, model.value_length))
