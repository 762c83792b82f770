"""Where the abstracts of a layer's keys lie: a tree over leaves of 16 tokens, of which every fourth level is kept.

A node spans 16 of the level below, whose abstracts lie together as a *group*: (key_length, 16) float16, then as many
bytes (`kv_index` says what they are). Levels end where few groups are left. Knows nothing about kernels.
"""

from dataclasses import dataclass

from cpu_kernels.kv_types import BLOCK_TOKENS, HALF_BYTES, LINE_BYTES

LEAF_TOKENS = 16
BLOCK_LEAVES = BLOCK_TOKENS // LEAF_TOKENS
FAN = 16  # nodes of a group
GROUP_BLOCKS = FAN // BLOCK_LEAVES  # that the leaves of a group span
FEW_GROUPS = 4  # that need no level above them


@dataclass(frozen=True, slots=True)
class IndexLayout:
    """The abstracts of one layer: KV head after head, level after level from the leaves up, group after group."""

    kv_heads: int
    key_length: int
    capacity_tokens: int

    @property
    def groups(self) -> tuple[int, ...]:
        """Of every level."""
        counts = [-(-self.capacity_tokens // (LEAF_TOKENS * FAN))]
        while counts[-1] > FEW_GROUPS:
            counts.append(-(-counts[-1] // FAN))
        return tuple(counts)

    @property
    def levels(self) -> int:
        """How many there are."""
        return len(self.groups)

    @property
    def group_bytes(self) -> int:
        """Whole cache lines."""
        return group_bytes(self.key_length)

    @property
    def head_bytes(self) -> int:
        """Of a KV head."""
        return sum(self.groups) * self.group_bytes

    @property
    def num_bytes(self) -> int:
        """Of all."""
        return self.kv_heads * self.head_bytes


def group_bytes(key_length: int) -> int:
    """Bytes of a group: whole cache lines."""
    return -(-key_length * FAN * (HALF_BYTES + 1) // LINE_BYTES) * LINE_BYTES


def abstract_bytes(kv_heads: int, key_length: int) -> int:
    """Bytes of a token's share of the abstracts of a layer, at most, in long contexts; 0 for a layer without heads."""
    if min(kv_heads, key_length) < 1:
        return 0
    return kv_heads * -(-group_bytes(key_length) // (LEAF_TOKENS * (FAN - 1)))
