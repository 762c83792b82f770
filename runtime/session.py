"""The KV cache of one conversation and the tokens it stands for.

Knows nothing of text. Invariant: row i of the cache was computed from `token_ids[: i + 1]`.
"""

from collections.abc import Sequence

from runtime.executor.base import KVHandle


class Session:
    """Keeps what was computed between the turns of a conversation, so that a turn costs only its new tokens."""

    def __init__(self, kv: KVHandle) -> None:
        self.kv = kv
        self.token_ids: list[int] = []

    def rewind_to(self, prompt_ids: Sequence[int]) -> int:
        """Drop what does not begin `prompt_ids` and return how many tokens stay computed.

        At least one token of the prompt is left to compute, since its logits are wanted.
        """
        common = 0
        limit = min(self.kv.length, len(prompt_ids) - 1)
        while common < limit and self.token_ids[common] == prompt_ids[common]:
            common += 1
        self.kv.truncate(common)
        self.token_ids = list(prompt_ids)
        return common

    def clear(self) -> None:
        """Forget everything."""
        self.kv.truncate(0)
        self.token_ids = []
