"""The keys and values of one sequence, layer by layer, in one piece of memory of full capacity.

Knows nothing of models: layers are numbers of heads and lengths. Memory is reserved but not touched before it is
written, so that on a CPU an unfilled cache costs address space alone. Layers with a sliding window keep every token
too. Invariants: a layer holds tokens 0..n-1 in order; `length` is what all layers hold, so that a pass which fails
half way is undone by `truncate(length)`.
"""

from collections.abc import Sequence

import torch


class KVCache:
    """Keys and values of up to `capacity_tokens` tokens; `layers`: (heads, key length, value length) of each."""

    def __init__(
        self,
        layers: Sequence[tuple[int, int, int]],
        capacity_tokens: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ) -> None:
        """Reserves the memory; ValueError for a capacity below 1 or no layers."""
        if capacity_tokens < 1 or not layers:
            raise ValueError(f"a KV cache of {capacity_tokens} tokens and {len(layers)} layers")
        self.capacity_tokens = capacity_tokens
        self._lengths = [0] * len(layers)
        self._keys = [
            torch.empty((heads, capacity_tokens, key), dtype=dtype, device=device) for heads, key, _ in layers
        ]
        self._values = [
            torch.empty((heads, capacity_tokens, value), dtype=dtype, device=device) for heads, _, value in layers
        ]

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return min(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes at full capacity."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds tokens to a layer: keys (tokens, heads, key length), values (tokens, heads, value length).

        They are rounded to the cache's type. ValueError if they go beyond the capacity; nothing is written then.
        """
        start = self._lengths[layer]
        stop = start + keys.shape[0]
        if stop > self.capacity_tokens:
            raise ValueError(f"{stop} tokens in a KV cache of {self.capacity_tokens}")
        self._keys[layer][:, start:stop] = keys.transpose(0, 1)
        self._values[layer][:, start:stop] = values.transpose(0, 1)
        self._lengths[layer] = stop

    def keys(self, layer: int, start: int = 0) -> torch.Tensor:
        """A view of a layer's keys from token `start` on: (heads, tokens, key length)."""
        return self._keys[layer][:, start : self._lengths[layer]]

    def values(self, layer: int, start: int = 0) -> torch.Tensor:
        """A view of a layer's values from token `start` on: (heads, tokens, value length)."""
        return self._values[layer][:, start : self._lengths[layer]]

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on, in every layer; ValueError below 0 or above `self.length`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncating a KV cache of {self.length} tokens to {length}")
        self._lengths = [length] * len(self._lengths)
