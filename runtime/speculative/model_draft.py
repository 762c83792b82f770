"""Drafts by a second, smaller model, token by token, with a KV cache of its own that follows the sequence.

Knows nothing about the target. The cache may be shorter than the sequence: then it holds the newest part, and starts
anew from half of its length when it is full. Invariant: row i of the cache was computed from the sequence's tokens
`first` to `first + i`, positions counted from `first`.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from offload.gguf import GGUFFile
from runtime.executor.base import Executor, KVHandle, Step
from runtime.sampler import Sampler
from runtime.speculative.draft import Candidate, Guide, Proposal, TreeGuide
from runtime.speculative.growth import grow

LEAST_READ = 16  # tokens that a draft without context begins with


class ModelSource:
    """`DraftSource` by an executor of the weights of `gguf`; both belong to this from now on.

    `vocab_size` and `context_tokens` are the draft's own.
    """

    def __init__(
        self,
        executor: Executor,
        gguf: GGUFFile,
        *,
        vocab_size: int,
        context_tokens: int,
        has_own_device: bool = False,
    ) -> None:
        self.name = gguf.path.name
        self._executor = executor
        self._gguf = gguf
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens
        self._has_own_device = has_own_device

    def sequence(self, sampler: Sampler, capacity_tokens: int) -> "ModelDraft":
        """See `DraftSource`."""
        kv = self._executor.new_kv(min(capacity_tokens, self._context_tokens))
        return ModelDraft(self._executor, kv, self.name, self._vocab_size, has_own_device=self._has_own_device)

    def close(self) -> None:
        """See `DraftSource`."""
        self._executor.close()
        self._gguf.close()


class ModelDraft:
    """`SequenceDraft` and `TreeDraft` by an executor and a cache."""

    grows_trees = True

    def __init__(
        self, executor: Executor, kv: KVHandle, name: str, vocab_size: int, *, has_own_device: bool = False
    ) -> None:
        self.has_own_device = has_own_device
        self._executor = executor
        self._kv = kv
        self._name = name
        self._vocab_size = vocab_size
        self._first = 0
        self._held: list[int] = []  # the tokens of the cache's rows
        self._certain = 0  # rows that belong to the sequence for sure

    def begin(self, token_ids: Sequence[int]) -> None:
        """See `SequenceDraft`. Rows of an earlier turn of a conversation stay where it begins alike."""
        self._certain = 0
        self._keep_common(token_ids)

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        """See `SequenceDraft`."""
        most = min(guide.most_computed, guide.most, self._kv.capacity_tokens // 2)
        if guide.tree is not None and guide.tree.most_depth <= self._kv.capacity_tokens // 2:
            return self._tree(token_ids, guide, guide.tree)
        if most < 1:
            return Proposal(source=self._name)
        row, read_tokens, read_s = self._read(token_ids, most, guide.reading_tokens)
        candidates: list[Candidate] = []
        while True:
            candidate = guide.choose(row, len(token_ids) + len(candidates))
            candidates.append(candidate)
            if len(candidates) == most or not guide.goes_on(self._name, candidate.confidence):
                return Proposal(tuple(candidates), self._name, True, read_tokens, read_s)
            row = self._forward([candidate.token_id])

    def _tree(self, token_ids: Sequence[int], guide: Guide, tree: TreeGuide) -> Proposal:
        """A tree behind `token_ids`; rows of one way are kept at a time."""
        row, read_tokens, read_s = self._read(token_ids, tree.most_depth, guide.reading_tokens)

        def expand(way: Sequence[int]) -> NDArray[np.float32]:
            if not way:
                return row
            wanted = [*token_ids, *way]
            self._keep_common(wanted)
            return self._forward(wanted[self._first + len(self._held) :])

        return replace(grow(self._name, tree, expand), read_tokens=read_tokens, read_s=read_s)

    def _read(self, token_ids: Sequence[int], most: int, reading_tokens: int) -> tuple[NDArray[np.float32], int, float]:
        """The logits behind `token_ids`, with room for `most` drafts; tokens read before its last two, and seconds."""
        started = time.perf_counter()
        self._keep_common(token_ids)
        self._place_window(len(token_ids), most, reading_tokens)
        unseen = token_ids[self._first + len(self._held) :]
        if len(unseen) > 2:  # more than an accepted token and the one behind it
            self._forward(unseen[:-1], wanted=False)
        read_tokens = max(len(unseen) - 2, 0)
        read_s = time.perf_counter() - started if read_tokens else 0.0
        row = self._forward(unseen[-1:] if read_tokens else unseen)
        self._certain = len(self._held)
        return row, read_tokens, read_s

    def _keep_common(self, token_ids: Sequence[int]) -> None:
        """Forget the rows of drafts that were rejected; one token at least is left to compute."""
        common = self._certain
        limit = min(len(self._held), len(token_ids) - self._first - 1)
        while common < limit and self._held[common] == token_ids[self._first + common]:
            common += 1
        self._truncate(max(0, min(common, limit)))
        if limit < 0:
            self._first = 0

    def _place_window(self, length: int, most: int, reading_tokens: int) -> None:
        """Begin anew where the cache is full, has seen nothing yet, or may read more than it holds now."""
        capacity = self._kv.capacity_tokens
        wanted = min(length, max(reading_tokens, LEAST_READ), capacity - most)
        if length - self._first + most > capacity:
            wanted = min(length, capacity // 2)
        elif self._held and (self._first == 0 or wanted < 2 * len(self._held)):
            return
        self._first = length - wanted
        self._truncate(0)

    def _truncate(self, rows: int) -> None:
        self._kv.truncate(rows)
        del self._held[rows:]
        self._certain = min(self._certain, rows)

    def _forward(self, token_ids: Sequence[int], *, wanted: bool = True) -> NDArray[np.float32]:
        """Compute tokens; the logits behind the last (vocabulary,) unless they are not wanted."""
        known = [token_id if token_id < self._vocab_size else 0 for token_id in token_ids]
        rows = self._executor.forward([Step(known, self._kv)], logits="last" if wanted else "none")[0]
        self._held += token_ids
        return rows[-1] if wanted else np.empty(0, np.float32)
