"""The KV heads of a model's layers, and the bytes that their keys and values take by a policy.

Knows nothing about the rest of a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cpu_kernels.kv_abstracts import abstract_bytes
from cpu_kernels.kv_policy import KVPolicy, token_bytes, window_bytes


@dataclass(frozen=True, slots=True)
class KVHeads:
    """The KV heads of a layer: how many, and dimensions of a key and of a value."""

    count: int
    key_length: int
    value_length: int


def kv_layers(layers: Sequence[KVHeads], kv: KVPolicy, new_tokens: int) -> list[tuple[int, int]]:
    """Bytes of a token's keys and values, and of the newest keys beside them while `new_tokens` are added, by layer."""
    sizes = []
    for layer, heads in enumerate(layers):
        key, value = kv.of_layer(layer, len(layers))
        window = window_bytes(key, heads.count, heads.key_length, new_tokens) if heads.key_length else 0
        held = token_bytes(key, value, heads.count, heads.key_length, heads.value_length)
        sizes.append((held + index_bytes(heads, kv, layer), window))
    return sizes


def index_bytes(heads: KVHeads, kv: KVPolicy, layer: int) -> int:
    """Of a layer's bytes of a token those of the abstracts by which what is read is chosen; 0 where all is read."""
    return abstract_bytes(heads.count, heads.key_length) if kv.is_chosen_from(layer) else 0
