"""A draft with a device of its own goes on from its best guess while the target verifies.

It drafts behind its proposal as if all of it were right, its first new token being the guess for the target's own one.
Where that comes true the rest is the next proposal, which then took no time; otherwise it is thrown away. Knows nothing
of devices. Invariant: the draft behind this is used by one thread at a time.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from runtime.speculative.draft import Guide, Proposal, SequenceDraft


@dataclass(frozen=True, slots=True)
class _Guess:
    """What a thread drafts behind `token_ids`."""

    token_ids: list[int]
    future: Future[Proposal]


class AheadDraft:
    """`SequenceDraft` around another one."""

    has_own_device = True

    @property
    def grows_trees(self) -> bool:
        """See `TreeDraft`: a guess is a chain, and a tree where it was wrong would take the time that it saves."""
        return False

    def __init__(self, draft: SequenceDraft) -> None:
        self._draft = draft
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="strata-draft")
        self._guess: _Guess | None = None
        self._ready: tuple[list[int], Proposal] | None = None

    def go_on(self, token_ids: Sequence[int], guide: Guide) -> None:
        """Draft behind `token_ids`, the last of which are drafts themselves, until `settle`."""
        guessed = list(token_ids)
        more = replace(guide, most=guide.most + 1, most_computed=guide.most_computed + 1)
        self._guess = _Guess(guessed, self._thread.submit(self._draft.propose, guessed, more))

    def settle(self) -> None:
        """Wait until the draft is idle; what failed meanwhile is raised here."""
        guess, self._guess, self._ready = self._guess, None, None
        if guess is not None:
            self._ready = guess.token_ids, guess.future.result()

    def begin(self, token_ids: Sequence[int]) -> None:
        """See `SequenceDraft`."""
        self.settle()
        self._ready = None
        self._draft.begin(token_ids)

    def propose(self, token_ids: Sequence[int], guide: Guide) -> Proposal:
        """See `SequenceDraft`."""
        self.settle_unless_ready()
        ready, self._ready = self._ready, None
        if ready is not None and len(ready[1].candidates) > 1:
            guessed, proposal = ready
            first, *rest = proposal.candidates
            if [*guessed, first.token_id] == list(token_ids):
                return replace(proposal, candidates=tuple(rest[: guide.most]), read_tokens=0, read_s=0.0)
        return self._draft.propose(token_ids, guide)

    def settle_unless_ready(self) -> None:
        """`settle`, if a guess is still being drafted."""
        if self._guess is not None:
            self.settle()

    def close(self) -> None:
        """Ends the thread after what it does."""
        self._thread.shutdown()
