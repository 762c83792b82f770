"""Drafts beside an engine: one source and one policy for all its sequences, and what they did.

Knows nothing of prompts or text. Invariant: with sample-and-match, the default, every answer is the one that plain
decoding gives (but nearly where a GPU and the CPU share a layer's experts, of which a warning tells); a draft that
fails is logged and left out from then on.
"""

import logging
import sys
import time
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from offload.closing import Closing
from offload.errors import RequestError
from offload.gguf import GGUFFile
from planner.drafts import EXPECTED_ACCEPTANCE, MOST_DRAFTS, pass_ratios, record_acceptance
from planner.plan import Plan
from planner.planned_draft import PlannedDraft
from planner.solve import question_of
from planner.ways import HYBRID, PROGRAM
from runtime.executor.base import Executor, ExpertFixingExecutor
from runtime.generation import Generation, Piece
from runtime.speculative.account import Account
from runtime.speculative.choosers import Chooser
from runtime.speculative.draft import DraftSource
from runtime.speculative.loading import load_draft
from runtime.speculative.options import DraftOptions
from runtime.speculative.pass_times import PassTimes
from runtime.speculative.policy import Policy
from runtime.speculative.rejection import RejectionSampler
from runtime.speculative.sequence import Passed, PlainTokens, SpeculativeSequence
from runtime.speculative.synthetic import SyntheticDraft, SyntheticSource
from runtime.speculative.together import Together
from runtime.speculative.totals import Totals
from runtime.text import ModelText

log = logging.getLogger("strata.speculative")

LOOPS = (PROGRAM, HYBRID)  # whose logits do not depend on how many tokens are computed at once


class Speculation(Closing):
    """Decodes the sequences of `executor` with drafts of `source`, which belongs to this from now on."""

    def __init__(
        self,
        executor: Executor,
        source: DraftSource,
        policy: Policy,
        *,
        rejection: bool = False,
        learned_as: tuple[str, str] | None = None,
    ) -> None:
        """`learned_as`: the names of target and draft under which the profile keeps how often drafts were right."""
        self.source = source
        self._learned_as = learned_as
        self.policy = policy
        self.totals = Totals(source.name)
        self._executor = executor
        self._together = Together(executor, policy)
        self._rejection = rejection
        self._sequences: WeakKeyDictionary[Generation, SpeculativeSequence] = WeakKeyDictionary()
        self._answers: WeakKeyDictionary[Generation, Sequence[int]] = WeakKeyDictionary()

    @property
    def needs_answers(self) -> bool:
        """Whether drafts are made of answers that must be told beforehand by `foresee`."""
        return isinstance(self.source, SyntheticSource)

    def begin(self) -> None:
        """A run begins: its totals are told apart."""
        self.totals = Totals(self.source.name, failure=self.totals.failure, trace=self.totals.trace)

    def foresee(self, generation: Generation, token_ids: Sequence[int]) -> None:
        """The sequence of `generation` will be this, prompt included."""
        self._answers[generation] = token_ids

    def next(self, generation: Generation) -> Passed | PlainTokens:
        """The logits for the next token of a sequence whose prompt was read and whose first token is drawn.

        Or how many tokens are best decoded without drafts.
        """
        sequence = self._sequences.get(generation)
        if sequence is None:
            account = Account()
            wait = self.policy.plain_tokens_before_start(account, len(generation.pieces))
            if wait:
                return PlainTokens(wait)
            started = time.perf_counter()
            sequence = self._sequence(generation, account)
            if sequence is None:
                return PlainTokens(sys.maxsize)
            self._sequences[generation] = sequence
            self.policy.started(account, time.perf_counter() - started)
        return sequence.next(generation, self.policy, self.totals)

    def next_of_several(self, generations: Sequence[Generation]) -> list[Piece | None] | PlainTokens:
        """The last token that each of several such sequences got of one pass; or how many are best decoded plainly."""
        group = self._together.group(len(generations))
        if group is None:
            self.totals.together = f"no pass takes drafts of {len(generations)} sequences here"
            return PlainTokens(sys.maxsize)
        if any(generation not in self._sequences for generation in generations):
            wait = group.policy.plain_tokens_before_start(group.account, 0)
            if wait:
                return PlainTokens(wait)
            started = time.perf_counter()
            if not all(self._begin(generation) for generation in generations):
                return PlainTokens(sys.maxsize)
            group.policy.started(group.account, time.perf_counter() - started)
        running = [(generation, self._sequences[generation]) for generation in generations]
        for generation, sequence in running:
            sequence.settle(generation, self.policy, self.totals)
        found = self._together.step(group, running, self.totals)
        return PlainTokens(found) if isinstance(found, int) else found

    def idled(self, lanes: int, passes: int) -> None:
        """So many passes over so many sequences were made without a thought of drafts."""
        group = self._together.group(lanes)
        if group is not None:
            group.policy.idled(passes, group.account)
            self.totals.add_idle(passes * lanes, lanes)

    def passed_plainly(self, lanes: int, seconds: float) -> None:
        """One of those passes took so long."""
        if lanes == 1:
            self.policy.passed_plainly(seconds)
        elif (group := self._together.group(lanes)) is not None:
            group.policy.passed_plainly(seconds)

    def settle(self, generation: Generation) -> None:
        """The next tokens are decoded without drafts, or there are none."""
        if generation in self._sequences:
            self._sequences[generation].settle(generation, self.policy, self.totals)

    def end(self, generation: Generation) -> None:
        """The answer is over."""
        sequence = self._sequences.pop(generation, None)
        if sequence is not None:
            sequence.end(generation, self.policy, self.totals)

    def learn(self) -> None:
        """Keep how often drafts were right for later plans, if that was seen often enough."""
        rate = self.policy.acceptance.measured
        if self._learned_as is not None and rate is not None:
            record_acceptance(*self._learned_as, rate)

    def close(self) -> None:
        """Free the source."""
        self.source.close()

    def _begin(self, generation: Generation) -> bool:
        """Prepare drafts for one of several sequences, unless they are; False where there are none."""
        if generation not in self._sequences:
            sequence = self._sequence(generation, Account())
            if sequence is None:
                return False
            self._sequences[generation] = sequence
        return True

    def _sequence(self, generation: Generation, account: Account) -> SpeculativeSequence | None:
        """The drafts of a sequence; those of a conversation's earlier turns go on. None after a failure."""
        if self.totals.failure is not None:
            return None
        session, sampler = generation.session, generation.sampler
        if self._rejection:
            generation.sampler = sampler = RejectionSampler.of(sampler)
        try:
            if session.drafted is None or session.drafted[0] is not self.source:
                session.drafted = self.source, self.source.sequence(sampler, session.kv.capacity_tokens)
            draft = session.drafted[1]
            if isinstance(draft, SyntheticDraft):
                draft.foresee(self._answers.get(generation, ()))
            draft.begin(session.token_ids)
        except Exception as error:  # noqa: BLE001 - whatever befalls a draft, the answer does not depend on it
            self.totals.fail(error)
            return None
        chooser = Chooser(sampler, draws=self._rejection)
        return SpeculativeSequence(self._executor, draft, chooser, account)


def make_speculation(
    options: DraftOptions, gguf: GGUFFile, text: ModelText, plan: Plan, executor: Executor
) -> Speculation | None:
    """What `options` ask for, or the plan has, beside a model that runs by `plan`; None where drafts are off.

    RequestError where the plan's loop does not give the same logits for several tokens as for each, or for a source
    that cannot be; DoesNotFitError for a draft model that the budget has no room for.
    """
    if not options.is_on and plan.draft is None:
        return None
    if plan.settings.loop not in LOOPS:
        raise RequestError(
            f"drafts cannot be verified by the {plan.settings.loop} loop: its logits change with the tokens of a step",
            hint="use --loop program, or --draft off",
        )
    if isinstance(executor, ExpertFixingExecutor):
        executor.fix_experts(MOST_DRAFTS + 1)
    loaded = load_draft(options, gguf, text.tokenizer, plan, executor)
    if loaded is None:
        return None
    policy = new_policy(options, gguf, plan, loaded.planned)
    learned_as = None if loaded.key is None else (plan.model.key, loaded.key)
    return Speculation(executor, loaded.source, policy, rejection=options.rejection, learned_as=learned_as)


def new_policy(options: DraftOptions, gguf: GGUFFile, plan: Plan, expected: PlannedDraft | None) -> Policy:
    """A policy that begins with what the plan predicts."""
    plain_s = 1 / plan.predicted.decode_tokens_per_s
    ratios = pass_ratios(question_of(plan, gguf), plan, MOST_DRAFTS + 1)
    return Policy(
        PassTimes(lambda tokens: plain_s * _ratio(ratios, tokens)),
        draft_s=expected.draft_s if expected is not None else 0.0,
        acceptance=expected.acceptance if expected is not None else options.synthetic or EXPECTED_ACCEPTANCE,
        most=options.most,
        most_tree=options.tree,
        is_forced=options.forced,
    )


def _ratio(ratios: Sequence[float], tokens: int) -> float:
    """That of a pass over so many tokens; of more than there are ratios, as the second half of them grows."""
    known, half = len(ratios), len(ratios) // 2
    if tokens <= known:
        return ratios[tokens - 1]
    return ratios[-1] + (tokens - known) * (ratios[-1] - ratios[half]) / (known - 1 - half)
