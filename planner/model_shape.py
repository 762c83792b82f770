"""What a model consists of, from the GGUF header alone: units with bytes, weights, and what one token touches.

A unit is what a plan places as a whole: the attention of a layer, its dense FFN, router, experts or shared expert,
the embedding, the output head. Norms and biases belong to the part they stand in. Works by GGUF tensor names and
hyper-parameter keys; knows nothing about how a forward pass is computed, and reads no tensor data.

Invariants: every tensor of the file is in exactly one unit; *active* is what one decoded token reads: its share of
the experts, one row of the embedding, and for a tied output the embedding matrix again, as the output head.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from cpu_kernels.kv_policy import F16_POLICY, KVPolicy
from cpu_kernels.kv_types import HALF_BYTES
from offload.errors import ModelFormatError, PlanError
from offload.gguf import GGUFFile, TensorInfo
from planner.kv_shape import KVHeads, index_bytes, kv_layers

PREFILL_TOKENS = 256  # most that the programs read of a prompt at a time
_MAX_LAYERS = 1 << 16
_MAX_WIDTH = 1 << 31

_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.([^.]+)(\.\d+)?\.")
_FFN_NORMS = frozenset({"ffn_norm", "ffn_sub_norm", "post_ffw_norm", "layer_output_norm"})
_EMBEDDING_PARTS = frozenset({"token_embd", "token_embd_norm", "position_embd", "token_types"})
_OUTPUT_PARTS = frozenset({"output", "output_norm"})


class UnitKind(StrEnum):
    """Parts of a model, in the order in which a token meets them."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    KV = "kv"
    DENSE_FFN = "dense_ffn"
    ROUTER = "router"
    EXPERTS = "experts"
    SHARED_EXPERT = "shared_expert"
    OTHER = "other"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Unit:
    """One part of a model. Bytes are those of the file; `layer` is None outside the blocks."""

    name: str
    kind: UnitKind
    layer: int | None
    num_bytes: int
    num_weights: int
    active_bytes: int
    active_weights: int
    active_bytes_by_type: tuple[tuple[str, int], ...]  # quant type name -> bytes
    num_matmuls: int  # matrices one token is multiplied with
    num_vectors: int  # norms, biases and scales
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The units of a model with the hyper-parameters that memory and time depend on."""

    architecture: str
    units: tuple[Unit, ...]
    block_count: int
    context_length: int
    embedding_length: int
    feed_forward_length: int  # widest hidden layer of an FFN, all experts of one token together
    head_count: int
    vocab_size: int
    expert_count: int
    expert_used_count: int
    kv_bytes_per_layer: tuple[int, ...]  # of one token: K and V in the types they are kept in
    num_parameters: int
    active_parameters: int
    largest_tensor_weights: int  # all experts, where they are stacked
    weights_by_type: tuple[tuple[str, int], ...]  # quant type name -> weights, largest first
    tied_output: bool
    kv_window_bytes: int = 0  # of the newest keys of all layers, beside them, while a prompt is read
    merge_count: int = 0  # of the vocabulary, where it is of the kind that has merges
    kv_heads: tuple[KVHeads, ...] = ()  # of every layer
    kv: KVPolicy = F16_POLICY  # how keys and values are kept and read

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(self.kv_bytes_per_layer)

    def kv_index_bytes(self, layer: int) -> int:
        """Of a layer's bytes of a token those of the index by which what is read is chosen; 0 where all is read."""
        return index_bytes(self.kv_heads[layer], self.kv, layer) if self.kv_heads else 0

    def head_length(self, layer: int) -> int:
        """Dimensions of a key and of a value of a layer, together; 0 where they are not known."""
        heads = self.kv_heads[layer] if self.kv_heads else None
        return 0 if heads is None else heads.key_length + heads.value_length

    def kv_numbers(self, layer: int) -> int:
        """Of a token's keys and values in a layer, whatever their type; float16 where heads are not known."""
        if not self.kv_heads:
            return self.kv_bytes_per_layer[layer] // HALF_BYTES
        return self.kv_heads[layer].count * self.head_length(layer)

    @property
    def num_matmuls_per_token(self) -> int:
        return sum(unit.num_matmuls for unit in self.units)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(unit.num_bytes for unit in self.units)

    @property
    def active_bytes(self) -> int:
        """Bytes of the file's weights that one token reads."""
        return sum(unit.active_bytes for unit in self.units)

    @property
    def active_weights(self) -> int:
        """Weights that one token reads; a tied embedding counts as the output head it also is."""
        return sum(unit.active_weights for unit in self.units)

    @classmethod
    def from_gguf(cls, gguf: GGUFFile, kv: KVPolicy | None = None) -> "ModelShape":
        """The shape of an open model that keeps keys and values by `kv`, in float16 without.

        PlanError for a vocabulary alone, ModelFormatError for absurd metadata.
        """
        if not gguf.tensors:
            raise PlanError(
                f"{gguf.path} holds a vocabulary alone: it has no weights that could be placed",
                hint="`strata tokenize` and `strata inspect` work with such a file",
            )
        arch = gguf.architecture
        block_count = gguf.get_int(f"{arch}.block_count", minimum=0, maximum=_MAX_LAYERS)
        embedding_length = gguf.get_int(f"{arch}.embedding_length", minimum=1, maximum=_MAX_WIDTH)
        expert_count = gguf.get_int(f"{arch}.expert_count", 0, minimum=0, maximum=_MAX_LAYERS)
        expert_used_count = gguf.get_int(f"{arch}.expert_used_count", 0, minimum=0, maximum=expert_count)
        head_count = max(_per_layer(gguf, f"{arch}.attention.head_count", block_count, default=1), default=1)
        units = _units(list(gguf.tensors.values()), expert_count, expert_used_count)
        kv_heads = _kv_heads(gguf, block_count, embedding_length, head_count)
        kv_sizes = kv_layers(kv_heads, kv or F16_POLICY, PREFILL_TOKENS)
        by_type: dict[str, int] = {}
        for tensor in gguf.tensors.values():
            by_type[tensor.quant_type.name] = by_type.get(tensor.quant_type.name, 0) + tensor.num_elements
        return cls(
            architecture=arch,
            units=units,
            block_count=block_count,
            context_length=gguf.get_int(f"{arch}.context_length", minimum=1, maximum=_MAX_WIDTH),
            embedding_length=embedding_length,
            feed_forward_length=_feed_forward_length(gguf, block_count, max(expert_used_count, 1)),
            head_count=head_count,
            vocab_size=_vocab_size(gguf),
            expert_count=expert_count,
            expert_used_count=expert_used_count,
            kv_bytes_per_layer=tuple(num_bytes for num_bytes, _ in kv_sizes),
            kv_window_bytes=sum(window for _, window in kv_sizes),
            num_parameters=sum(unit.num_weights for unit in units),
            active_parameters=sum(min(unit.active_weights, unit.num_weights) for unit in units),
            largest_tensor_weights=max(tensor.num_elements for tensor in gguf.tensors.values()),
            weights_by_type=tuple(sorted(by_type.items(), key=lambda item: (-item[1], item[0]))),
            tied_output="output.weight" not in gguf.tensors,
            merge_count=len(gguf.get_strings("tokenizer.ggml.merges", ())),
            kv_heads=kv_heads,
            kv=kv or F16_POLICY,
        )

    def with_kv(self, kv: KVPolicy) -> "ModelShape":
        """The same model that keeps keys and values by `kv`."""
        layers = kv_layers(self.kv_heads, kv, PREFILL_TOKENS)
        return replace(
            self,
            kv_bytes_per_layer=tuple(num_bytes for num_bytes, _ in layers),
            kv_window_bytes=sum(window for _, window in layers),
            kv=kv,
        )


def _units(tensors: Sequence[TensorInfo], expert_count: int, expert_used_count: int) -> tuple[Unit, ...]:
    """All units in the order a token meets them: embedding, the parts of each layer, output."""
    routed = {int(m[1]) for t in tensors if (m := _BLOCK_TENSOR.match(t.name)) and m[2] == "ffn_gate_inp"}
    parts: dict[tuple[int | None, UnitKind], list[TensorInfo]] = {}
    for tensor in tensors:
        parts.setdefault(_classify(tensor.name, routed), []).append(tensor)
    embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
    tied = embedding if all(t.name != "output.weight" for t in tensors) else None
    if tied is not None:
        parts.setdefault((None, UnitKind.OUTPUT), [])
    order = list(UnitKind)

    def position(part: tuple[int | None, UnitKind]) -> tuple[float, int]:
        layer, kind = part
        outside = -1 if kind is UnitKind.EMBEDDING else _MAX_LAYERS
        return (outside if layer is None else layer, order.index(kind))

    return tuple(
        _unit(layer, kind, parts[layer, kind], tied, (expert_used_count, max(expert_count, 1)))
        for layer, kind in sorted(parts, key=position)
    )


def _classify(name: str, routed: set[int]) -> tuple[int | None, UnitKind]:
    """(layer, kind) of a tensor; `routed` are the layers that have a router."""
    match = _BLOCK_TENSOR.match(name)
    if match is None:
        part = name.split(".", 1)[0]
        if part in _EMBEDDING_PARTS:
            return None, UnitKind.EMBEDDING
        return None, UnitKind.OUTPUT if part in _OUTPUT_PARTS else UnitKind.OTHER
    layer, part, expert = int(match[1]), match[2], match[3]
    if part.endswith("_shexp"):
        return layer, UnitKind.SHARED_EXPERT
    if part.endswith("_exps") or (part.startswith("ffn_") and expert is not None):
        return layer, UnitKind.EXPERTS
    if part in ("ffn_gate_inp", "exp_probs_b"):
        return layer, UnitKind.ROUTER
    if part in _FFN_NORMS:
        return layer, UnitKind.ROUTER if layer in routed else UnitKind.DENSE_FFN
    return layer, UnitKind.DENSE_FFN if part.startswith("ffn_") else UnitKind.ATTENTION


def _unit(
    layer: int | None, kind: UnitKind, tensors: Sequence[TensorInfo], tied: TensorInfo | None, experts: tuple[int, int]
) -> Unit:
    """The unit of `tensors`; `tied` is the matrix an output head without its own borrows, `experts` (used, count)."""
    active = [_active(tensor, kind, experts) for tensor in tensors]
    matrices = [tensor for tensor in tensors if len(tensor.shape) - bool(tensor.num_experts) >= 2]
    num_matmuls = len(matrices)
    if kind is UnitKind.EXPERTS:
        used, count = experts
        num_matmuls = sum(max(tensor.num_experts, 1) for tensor in matrices) * used // count
    elif kind is UnitKind.EMBEDDING:
        num_matmuls = 0
    if kind is UnitKind.OUTPUT and tied is not None:
        active.append((tied.quant_type.name, tied.num_bytes, tied.num_elements))
        num_matmuls += 1
    by_type: dict[str, int] = {}
    for name, num_bytes, _ in active:
        by_type[name] = by_type.get(name, 0) + num_bytes
    return Unit(
        name=kind.value if layer is None else f"blk.{layer}.{kind.value}",
        kind=kind,
        layer=layer,
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        num_weights=sum(tensor.num_elements for tensor in tensors),
        active_bytes=sum(num_bytes for _, num_bytes, _ in active),
        active_weights=sum(num_weights for _, _, num_weights in active),
        active_bytes_by_type=tuple(by_type.items()),
        num_matmuls=num_matmuls,
        num_vectors=len(tensors) - len(matrices),
        tensors=tuple(tensor.name for tensor in tensors),
    )


def _active(tensor: TensorInfo, kind: UnitKind, experts: tuple[int, int]) -> tuple[str, int, int]:
    """(quant type, bytes, weights) that one token reads of a tensor."""
    share, parts = 1, 1
    if kind is UnitKind.EXPERTS:
        share, parts = experts
    elif kind is UnitKind.EMBEDDING and len(tensor.shape) == 2:
        parts = max(tensor.shape[0], 1)
    return tensor.quant_type.name, tensor.num_bytes * share // parts, tensor.num_elements * share // parts


def _per_layer(gguf: GGUFFile, key: str, block_count: int, *, default: int) -> list[int]:
    """A hyper-parameter that is one number for all layers or an array with one for each."""
    value = gguf.metadata.get(key, default)
    if isinstance(value, (int, float, str, bool)):
        return [gguf.get_int(key, default, minimum=0, maximum=_MAX_WIDTH)] * block_count
    numbers = [int(number) for number in gguf.get_ints(key)]
    if len(numbers) != block_count or any(not 0 <= number <= _MAX_WIDTH for number in numbers):
        raise ModelFormatError(f"{gguf.path}: {key} must hold {block_count} counts, one a layer")
    return numbers


def _feed_forward_length(gguf: GGUFFile, block_count: int, expert_used_count: int) -> int:
    arch = gguf.architecture
    dense = max(_per_layer(gguf, f"{arch}.feed_forward_length", block_count, default=0), default=0)
    expert = gguf.get_int(f"{arch}.expert_feed_forward_length", 0, minimum=0, maximum=_MAX_WIDTH)
    shared = gguf.get_int(f"{arch}.expert_shared_feed_forward_length", 0, minimum=0, maximum=_MAX_WIDTH)
    return max(dense, (expert or dense) * expert_used_count, shared)


def _kv_heads(gguf: GGUFFile, block_count: int, embedding_length: int, head_count: int) -> tuple[KVHeads, ...]:
    """Those of every layer."""
    arch = gguf.architecture
    heads = _per_layer(gguf, f"{arch}.attention.head_count_kv", block_count, default=head_count)
    length = embedding_length // max(head_count, 1)
    key_length = gguf.get_int(f"{arch}.attention.key_length", length, minimum=0, maximum=_MAX_WIDTH)
    value_length = gguf.get_int(f"{arch}.attention.value_length", length, minimum=0, maximum=_MAX_WIDTH)
    return tuple(KVHeads(count, key_length, value_length) for count in heads)


def _vocab_size(gguf: GGUFFile) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        return embedding.shape[0]
    return gguf.get_int(f"{gguf.architecture}.vocab_size", len(gguf.get_strings("tokenizer.ggml.tokens", ())))
