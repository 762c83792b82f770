"""The KV cache of one conversation and the tokens it stands for.

Knows nothing of text. Invariant: row i of the cache was computed from `token_ids[: i + 1]`; while an
answer is decoded with drafts, rows behind them may wait for their tokens.
"""

from collections.abc import Sequence
from typing import Protocol

from runtime.executor.base import KVHandle, WindowedKV
from runtime.speculative.draft import DraftSource, SequenceDraft


class RowsSource(Protocol):
    """Where rows that were computed before lie, and where those of this session go."""

    def restore(self, kv: KVHandle, token_ids: Sequence[int], held: int) -> int:
        """Rows of `kv` that hold `token_ids` afterwards, of which `held` did before; at least one token is left."""
        ...

    def keep(self, kv: KVHandle, token_ids: Sequence[int], prompt_tokens: int) -> None:
        """An answer ended: the rows of `kv` hold `token_ids`, of which so many were its prompt."""
        ...


class Session:
    """Keeps what was computed between the turns of a conversation, so that a turn costs only its new tokens.

    `rows`: where more of it may be found, and is kept beyond the session.
    """

    def __init__(self, kv: KVHandle, rows: RowsSource | None = None) -> None:
        self.kv = kv
        self.rows = rows
        self.prompt_tokens = 0  # of the last prompt
        self.token_ids: list[int] = []
        self.drafted: tuple[DraftSource, SequenceDraft] | None = None  # what earlier answers were drafted with

    def rewind_to(self, prompt_ids: Sequence[int]) -> int:
        """Drop what does not begin `prompt_ids` and return how many tokens stay computed.

        At least one token of the prompt is left to compute, since its logits are wanted.
        """
        common = 0
        limit = min(self.kv.length, len(prompt_ids) - 1)
        while common < limit and self.token_ids[common] == prompt_ids[common]:
            common += 1
        if isinstance(self.kv, WindowedKV):
            common = self.kv.cut_at(common)
        self.kv.truncate(common)
        self.token_ids = list(prompt_ids)
        self.prompt_tokens = len(prompt_ids)
        return common if self.rows is None else self.rows.restore(self.kv, prompt_ids, common)

    def keep(self) -> None:
        """Lets the rows outlive the session, where there is a place for them."""
        if self.rows is not None:
            self.rows.keep(self.kv, self.token_ids[: self.kv.length], self.prompt_tokens)

    def clear(self) -> None:
        """Forget everything."""
        self.kv.truncate(0)
        self.token_ids = []
