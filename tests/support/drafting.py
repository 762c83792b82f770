"""A model without weights and drafts by script, for speculative decoding: logits are a hash of the tokens before."""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.executor.base import LogitsWanted, Step
from runtime.generation import Generation
from runtime.sampler import SamplingParams
from runtime.session import Session
from runtime.speculative.account import Account
from runtime.speculative.choosers import Chooser
from runtime.speculative.draft import Candidate, Guide, Proposal, SequenceDraft
from runtime.speculative.growth import grow
from runtime.speculative.pass_times import PassTimes
from runtime.speculative.policy import Policy
from runtime.speculative.sequence import Passed, SpeculativeSequence
from runtime.speculative.totals import Totals
from runtime.tokenizer.stream import StreamDecoder
from tests.support import models

VOCABULARY = [bytes([code]) for code in range(97, 117)] + [b"\xe2\x82", b"\xac", b""]
END = len(VOCABULARY) - 1


class ListKV:
    """Keeps the tokens themselves."""

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.rows: list[int] = []

    @property
    def length(self) -> int:
        return len(self.rows)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= len(self.rows)
        del self.rows[length:]


class HashExecutor:
    """Logits behind a token depend on it, its position and the two tokens before it."""

    most_pass_tokens = 64

    def __init__(self, vocab_size: int = len(VOCABULARY), *, salt: int = 0) -> None:
        self.vocab_size = vocab_size
        self.salt = salt
        self.passes: list[int] = []
        self.fails_at: int | None = None

    def new_kv(self, capacity_tokens: int) -> ListKV:
        return ListKV(capacity_tokens)

    def forward(self, steps: Sequence[Step], *, logits: LogitsWanted = "last") -> list[NDArray[np.float32]]:
        results = []
        for step in steps:
            if self.fails_at is not None and len(self.passes) >= self.fails_at:
                raise RuntimeError("the device is gone")
            self.passes.append(len(step.token_ids))
            assert isinstance(step.kv, ListKV)
            before, rows = step.kv.length, []
            assert before + max(step.depths) < step.kv.capacity_tokens
            for token_id, depth in zip(step.token_ids, step.depths, strict=True):
                step.kv.truncate(before + depth)
                step.kv.rows.append(token_id)
                rows.append(self._row(step.kv.rows))
            results.append(np.stack(rows[-1:] if logits == "last" else rows))
        return results

    def close(self) -> None:
        pass

    def _row(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        seed = zlib.crc32(np.array([len(tokens), *tokens[-3:]], np.int64).tobytes()) + self.salt
        return np.random.default_rng(seed).normal(0, 2, self.vocab_size).astype(np.float32)


class LetterTokenizer:
    """One token a letter, two halves of a character, and an end."""

    vocab_size = len(VOCABULARY)
    eog_ids: frozenset[int] = frozenset({END})

    def stream(self, *, prompt_ids: Sequence[int]) -> StreamDecoder:
        return StreamDecoder(lambda token_id: VOCABULARY[token_id])


class AnyLetterTokenizer(LetterTokenizer):
    """For the small models of the tests: any token is a letter; none ends an answer."""

    vocab_size = models.VOCAB
    eog_ids: frozenset[int] = frozenset()

    def stream(self, *, prompt_ids: Sequence[int]) -> StreamDecoder:
        return StreamDecoder(lambda token_id: VOCABULARY[token_id % 20])


class PatternDraft:
    """Knows the answer; drafts `counts[i]` tokens in its i-th proposal, right where `pattern` says so."""

    def __init__(
        self, answer: Sequence[int], pattern: Sequence[bool], counts: Sequence[int], *, has_own_device: bool = False
    ) -> None:
        self.has_own_device = has_own_device
        self.calls = 0
        self.fails_at: int | None = None
        self._answer = list(answer)
        self._pattern = list(pattern)
        self._counts = list(counts)

    def begin(self, token_ids: Sequence[int]) -> None:
        assert list(token_ids) == self._answer[: len(token_ids)] or not self._answer

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise RuntimeError("the draft's device is gone")
        count = min(self._counts[self.calls % len(self._counts)], guide.most)
        self.calls += 1
        start = len(token_ids)
        drafted = []
        for position in range(start, start + count):
            right = position < len(self._answer) and self._pattern[position % len(self._pattern)]
            known = self._answer[position] if position < len(self._answer) else 0
            drafted.append(Candidate(known if right else (known + 1) % len(VOCABULARY), 0.5))
        return Proposal(tuple(drafted), "pattern", is_computed=True)


class TreePatternDraft:
    """Knows the answer; grows trees of `most` drafts, where the choice of rank `ranks[position]`, if any, is right."""

    has_own_device = False
    grows_trees = True

    def __init__(self, answer: Sequence[int], ranks: Sequence[int], most: int) -> None:
        self.trees = 0
        self._answer = list(answer)
        self._ranks = list(ranks)
        self._most = most

    def begin(self, token_ids: Sequence[int]) -> None:
        pass

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        if guide.tree is None:
            return Proposal()
        self.trees += 1

        def choose(way: Sequence[int], _logits: NDArray[np.float32]) -> list[Candidate]:
            position = len(token_ids) + len(way)
            is_known = [*token_ids, *way] == self._answer[:position] and position < len(self._answer)
            right = self._answer[position] if is_known else position % 7
            rank = self._ranks[position % len(self._ranks)]
            choices = [(right + 1 + other) % len(VOCABULARY) for other in range(3)]
            if rank < 3:
                choices[rank] = right
            return [Candidate(token_id, 0.5 - 0.15 * place, rank=place) for place, token_id in enumerate(choices)]

        tree = replace(guide.tree, most=min(guide.tree.most, self._most), choose=choose)
        return grow("pattern", tree, lambda _way: np.empty(0, np.float32))


def generation(
    prompt: Sequence[int], sampling: SamplingParams, *, capacity: int = 80, session: Session | None = None, **options
) -> Generation:
    """An answer that begins."""
    return Generation(
        LetterTokenizer(), session or Session(ListKV(capacity)), list(prompt), sampling=sampling, **options
    )


def plain(executor: HashExecutor, state: Generation) -> Generation:
    """`state` decoded token by token."""
    while not state.finished:
        state.advance(executor.forward([state.next_step(100)])[0][-1])
    return state


def policy(*, most: int = 8, most_tree: int = 0, forced: bool = True, plain_s: float = 1e-3) -> Policy:
    """One that verifies all, or one for a target whose passes cost alike."""
    times = PassTimes(lambda _tokens: plain_s)
    return Policy(times, draft_s=1e-5, acceptance=0.6, most=most, most_tree=most_tree, is_forced=forced)


def drafted(
    executor: HashExecutor,
    state: Generation,
    draft: SequenceDraft,
    *,
    by: Policy | None = None,
    totals: Totals | None = None,
    stop_after: int | None = None,
) -> Generation:
    """`state` decoded with drafts; wound up once it has `stop_after` tokens."""
    state.advance(executor.forward([state.next_step(100)])[0][-1])
    chooser = Chooser(state.sampler)
    sequence = SpeculativeSequence(executor, draft, chooser, Account())
    by = by or policy()
    counts = totals or Totals("test")
    if not state.finished:
        draft.begin(state.session.token_ids)
    while not state.finished:
        if stop_after is not None and len(state.pieces) >= stop_after:
            state.wind_up()
        passed = sequence.next(state, by, counts)
        if isinstance(passed, Passed):
            state.advance(passed.row)
        else:
            state.advance(executor.forward([state.next_step(100)])[0][-1])
    sequence.end(state, by, counts)
    return state
