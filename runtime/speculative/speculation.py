"""Drafts beside an engine: one source and one policy for all its sequences, and what they did.

Knows nothing of prompts or text. Invariant: with sample-and-match, the default, every answer is the one that plain
decoding gives (on a GPU up to the last bits of logits, of which a warning tells); a draft that fails is logged and left
out from then on.
"""

import logging
import sys
import time
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from offload.closing import Closing
from offload.errors import RequestError
from offload.gguf import GGUFFile
from planner.drafts import EXPECTED_ACCEPTANCE, MOST_DRAFTS, DraftForecast, pass_ratios
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.profile import load_or_measure
from planner.ways import HYBRID, PROGRAM
from runtime.executor.base import Executor
from runtime.generation import Generation
from runtime.speculative.account import Account
from runtime.speculative.choosers import Chooser
from runtime.speculative.draft import DraftSource
from runtime.speculative.estimates import PassTimes
from runtime.speculative.loading import load_draft
from runtime.speculative.options import DraftOptions
from runtime.speculative.policy import Policy
from runtime.speculative.rejection import RejectionSampler
from runtime.speculative.sequence import Passed, PlainTokens, SpeculativeSequence
from runtime.speculative.synthetic import SyntheticDraft, SyntheticSource
from runtime.speculative.totals import Totals
from runtime.text import ModelText

log = logging.getLogger("strata.speculative")

LOOPS = (PROGRAM, HYBRID)  # whose logits depend on how many tokens are computed at once not at all, or hardly


class Speculation(Closing):
    """Decodes the sequences of `executor` with drafts of `source`, which belongs to this from now on."""

    def __init__(
        self,
        executor: Executor,
        source: DraftSource,
        policy: Policy,
        *,
        rejection: bool = False,
        forecast: DraftForecast | None = None,
    ) -> None:
        """`forecast`: what the planner expects of the source, for showing."""
        self.source = source
        self.forecast = forecast
        self.policy = policy
        self.totals = Totals(source.name)
        self._executor = executor
        self._rejection = rejection
        self._sequences: WeakKeyDictionary[Generation, SpeculativeSequence] = WeakKeyDictionary()
        self._answers: WeakKeyDictionary[Generation, Sequence[int]] = WeakKeyDictionary()

    @property
    def needs_answers(self) -> bool:
        """Whether drafts are made of answers that must be told beforehand by `foresee`."""
        return isinstance(self.source, SyntheticSource)

    def begin(self) -> None:
        """A run begins: its totals are told apart."""
        self.totals = Totals(self.source.name, failure=self.totals.failure)

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
        return sequence.next(generation, self.totals)

    def settle(self, generation: Generation) -> None:
        """The next tokens are decoded without drafts, or there are none."""
        if generation in self._sequences:
            self._sequences[generation].settle(generation, self.totals)

    def end(self, generation: Generation) -> None:
        """The answer is over."""
        sequence = self._sequences.pop(generation, None)
        if sequence is not None:
            sequence.end(generation, self.totals)

    def close(self) -> None:
        """Free the source."""
        self.source.close()

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
        return SpeculativeSequence(self._executor, draft, self.policy, chooser, account)


def make_speculation(
    options: DraftOptions, gguf: GGUFFile, text: ModelText, plan: Plan, executor: Executor
) -> Speculation | None:
    """What `options` ask for beside a model that runs by `plan`; None where drafts are off.

    RequestError where the plan's loop does not give the same logits for several tokens as for each, or for a source
    that cannot be; DoesNotFitError for a draft model that the budget has no room for.
    """
    if not options.is_on:
        return None
    if plan.settings.loop not in LOOPS:
        raise RequestError(
            f"drafts cannot be verified by the {plan.settings.loop} loop: its logits change with the tokens of a step",
            hint="use --loop program, or --draft off",
        )
    if plan.settings.loop == HYBRID:
        log.warning(
            "a GPU's sums end differently for several tokens than for one: where two tokens are all but equally "
            "likely, drafts may change the answer"
        )
    loaded = load_draft(options, gguf, text.tokenizer, plan)
    policy = new_policy(options, gguf, plan, loaded.forecast)
    return Speculation(executor, loaded.source, policy, rejection=options.rejection, forecast=loaded.forecast)


def new_policy(options: DraftOptions, gguf: GGUFFile, plan: Plan, expected: DraftForecast | None) -> Policy:
    """A policy that begins with what the plan predicts."""
    plain_s = 1 / plan.predicted.decode_tokens_per_s
    shape = ModelShape.from_gguf(gguf, plan.settings.kv)
    ratios = pass_ratios(shape, load_or_measure(), plan.settings.threads, MOST_DRAFTS + 1)
    return Policy(
        PassTimes(lambda tokens: plain_s * ratios[tokens - 1]),
        draft_s=expected.draft_s if expected is not None else 0.0,
        acceptance=EXPECTED_ACCEPTANCE if options.synthetic is None else options.synthetic,
        most=options.most,
        is_forced=options.forced,
    )
