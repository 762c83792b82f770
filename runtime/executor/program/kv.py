"""The keys and values of one sequence as the attention kernels want them, all layers in one piece of memory.

Knows nothing of models. Memory is reserved but not touched before it is written. Invariant: every layer holds the
first `length` tokens; what lies behind them is never used, so that a pass which fails half way changes nothing.
"""

from cpu_kernels.kv_layout import BLOCK_TOKENS, KVLayout
from cpu_kernels.memory import ALIGNMENT
from offload.memory import reserved_bytes


class ProgramKV:
    """Keys and values of up to `capacity_tokens` tokens in `layers` layers of float16.

    Memory is reserved for a power of two of blocks, so that few programs serve sequences of every capacity, and in
    small pages, so that what is never written takes no RAM. Huge ones made decode at 3900 tokens of a 1B model no
    faster (29.4 ms a token against 29.2, one Zen 5 core).
    """

    def __init__(self, layers: int, kv_heads: int, key_length: int, value_length: int, capacity_tokens: int) -> None:
        """ValueError for a capacity below 1."""
        if capacity_tokens < 1:
            raise ValueError(f"a KV cache of {capacity_tokens} tokens")
        self.capacity_tokens = capacity_tokens
        self.length = 0
        blocks = -(-capacity_tokens // BLOCK_TOKENS)
        reserved_tokens = BLOCK_TOKENS << (blocks - 1).bit_length()
        self.layout = KVLayout(kv_heads, key_length, value_length, reserved_tokens)
        self._memory = reserved_bytes(layers * layer_bytes(self.layout), huge_pages=False)
        self._layers = layers

    @property
    def address(self) -> int:
        """Of the first layer's keys; its values follow, then the next layer."""
        return int(self._memory.ctypes.data)

    @property
    def num_bytes(self) -> int:
        """Bytes of `capacity_tokens` tokens."""
        layout = self.layout
        token_bytes = 2 * layout.kv_heads * (layout.key_length + layout.value_length)
        return self._layers * token_bytes * self.capacity_tokens

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on; ValueError below 0 or above `self.length`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncating a KV cache of {self.length} tokens to {length}")
        self.length = length


def layer_bytes(layout: KVLayout) -> int:
    """Bytes from a layer's keys to the next layer's."""
    assert layout.key_bytes % ALIGNMENT == 0, "blocks of 64 tokens are whole cache lines"
    return layout.key_bytes + layout.value_bytes
