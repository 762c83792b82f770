"""Which types the layers of a sequence keep keys and values in, and which heads are turned before they are rounded.

First and last layers are kept in 8 bits where less was asked for: models with biases on keys break there. A budget says
how much of it a new token reads: the first two layers are read whole. Knows nothing about models but the number of
their layers and the lengths of their heads.
"""

from dataclasses import dataclass

from cpu_kernels.kv_layout import KVLayout, can_rotate
from cpu_kernels.kv_types import BLOCK_TOKENS, KVType

# Heads that are turned, by `strata kv-eval` in every layer, 12 chunks of 512 tokens. Perplexity more than float16's for
# the demo model without, with keys, with values, with both turned: q4_0 .107 .058 .058 .047; kivi4 .049 .043 .067 .077;
# kivi2 .920 .769 .711 .669. A model whose keys have outlying channels (stories260K, heads of 8) loses 2.32 with keys in
# q4_0 and 1.28 when they are turned, but .44 and 1.13 in kivi2: a scale a channel does better with such channels apart.
# There keys in q8_0 diverge by 1.77e-3 from float16, turned by 0.97e-3.
TURNED_KEYS = frozenset({KVType.Q8_0, KVType.Q4_0})
TURNED_VALUES = frozenset({KVType.Q4_0, KVType.KIVI2})
EDGE_TYPE = KVType.Q8_0
DENSE_LAYERS = 2  # that are read whole: what they look at is spread out (Quest, arXiv:2406.10774)
LEAST_BUDGET_TOKENS = 4 * BLOCK_TOKENS
READ_MOST = 2  # tokens that are read for one of the budget: what is chosen is read with its block
HELD_WINDOW_BLOCKS = 2  # of a window, between two steps: the newest tokens' own, and one for drafts that are taken back


@dataclass(frozen=True, slots=True)
class KVPolicy:
    """The types asked for; `keeps_edges`: first and last layer have at least 8 bits; `budget_tokens`: how many tokens
    of a KV head a new one chooses to read, None for all; with their neighbors at most twice as many are read.
    """

    key: KVType = KVType.F16
    value: KVType = KVType.F16
    keeps_edges: bool = True
    budget_tokens: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all is float16, and is read."""
        return self.key is KVType.F16 and self.value is KVType.F16 and self.budget_tokens is None

    @property
    def name(self) -> str:
        """Says all that the kept bits depend on."""
        budget = "" if self.budget_tokens is None else f", budget {self.budget_tokens}"
        return f"{self.key}/{self.value}{'' if self.keeps_edges else ' in every layer'}{budget}"

    def is_chosen_from(self, layer: int) -> bool:
        """Whether a layer is not read whole."""
        return self.budget_tokens is not None and layer >= DENSE_LAYERS

    def read_tokens(self, layer: int, tokens: int) -> int:
        """Of so many tokens in a layer how many a new one reads, at most."""
        if self.budget_tokens is None or not self.is_chosen_from(layer):
            return tokens
        return min(READ_MOST * self.budget_tokens, tokens)

    def of_layer(self, layer: int, layers: int) -> tuple[KVType, KVType]:
        """The types of one of `layers` layers' keys and values."""
        if not self.keeps_edges or layer not in (0, layers - 1):
            return self.key, self.value
        key, value = (EDGE_TYPE if kind.bits < EDGE_TYPE.bits else kind for kind in (self.key, self.value))
        return key, value

    def layouts(
        self, layers: int, kv_heads: int, key_length: int, value_length: int, capacity_tokens: int
    ) -> tuple[KVLayout, ...]:
        """Of all layers."""
        return tuple(
            _layout(*self.of_layer(layer, layers), (kv_heads, key_length, value_length, capacity_tokens))
            for layer in range(layers)
        )


F16_POLICY = KVPolicy()


def token_bytes(key: KVType, value: KVType, kv_heads: int, key_length: int, value_length: int) -> int:
    """Bytes of a token's keys and values in one layer; 0 for a layer without heads."""
    if min(kv_heads, key_length, value_length) < 1:
        return 0
    return KVLayout(kv_heads, key_length, value_length, BLOCK_TOKENS, key, value).token_bytes


def window_bytes(key: KVType, kv_heads: int, key_length: int, new_tokens: int) -> int:
    """Bytes that a window of keys holds at most in one layer, while `new_tokens` are added; 0 for types without."""
    if not key.has_minimum:
        return 0
    blocks = HELD_WINDOW_BLOCKS + -(-new_tokens // BLOCK_TOKENS)
    return kv_heads * blocks * KVType.F16.key_block_bytes(key_length)


def _layout(key: KVType, value: KVType, sizes: tuple[int, int, int, int]) -> KVLayout:
    _, key_length, value_length, _ = sizes
    turns_keys, turns_values = key in TURNED_KEYS, value in TURNED_VALUES
    return KVLayout(
        *sizes,
        key_type=key,
        value_type=value,
        rotates_keys=turns_keys and can_rotate(key_length),
        rotates_values=turns_values and can_rotate(value_length),
    )
