"""Sequences that begin with the same tokens: rows of their KV caches are computed once, and held by all of them.

Knows nothing about how caches share rows. Invariant: what a sequence yields is the same with and without sharing.
"""

from collections.abc import Iterable, Sequence

from runtime.executor.base import Executor, SharingExecutor
from runtime.generation import Generation
from runtime.session import RowsSource, Session

LEAST_TOKENS = 32  # that it is worth waiting for


class SharedPrefixes:
    """For sequences of `executor`; those of executors that cannot share have all their rows for themselves."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._sharing = executor if isinstance(executor, SharingExecutor) else None
        self.tokens = 0  # of prompts that were not computed again

    def session(
        self, ids: Sequence[int], capacity_tokens: int, rows: RowsSource | None, others: Iterable[Generation]
    ) -> Session:
        """One for the prompt `ids`, which holds what it has in common with the others as far as they are computed."""
        session = Session(self._executor.new_kv(capacity_tokens), rows)
        found = max(others, key=lambda other: _computed(ids, other), default=None)
        if self._sharing is not None and found is not None and (tokens := _computed(ids, found)):
            shared = self._sharing.share_kv(session.kv, found.session.kv, tokens)
            session.token_ids = list(ids[:shared])
            self.tokens += shared
        return session

    def is_coming(self, ids: Sequence[int], others: Sequence[Generation]) -> bool:
        """Whether one of the others will soon have computed more of the prompt than any has now."""
        if self._sharing is None:
            return False
        now = max((_computed(ids, other) for other in others), default=0)
        return any(_common(ids, other) >= now + LEAST_TOKENS for other in others if other.prompt_tokens_left)


def _common(ids: Sequence[int], other: Generation) -> int:
    """Tokens that a prompt begins with as another sequence does; the last one's logits are wanted, so it is left."""
    theirs = other.session.token_ids
    limit = min(len(ids) - 1, len(theirs))
    return next((index for index in range(limit) if ids[index] != theirs[index]), limit)


def _computed(ids: Sequence[int], other: Generation) -> int:
    return min(_common(ids, other), other.session.kv.length)
