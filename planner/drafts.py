"""What drafts cost and bring beside a target: a pass over several tokens, a turn with its drafts, what was learned.

Knows nothing about how drafts are made, or how a plan chooses one. A target's pass over n tokens is predicted as its
decode step times the ratio of such passes: on the CPU by its kernels, with the union of the experts that n tokens use,
from flash too; with a GPU by the simulated step.
"""

from collections.abc import Callable
from dataclasses import replace

from planner.draft_depth import expected_tokens
from planner.drive import streaming_here
from planner.executed import hybrid_run
from planner.packed_pass import pass_seconds
from planner.plan import Plan
from planner.planned_draft import LearnedAcceptance
from planner.profile import Profile, load_or_measure, save
from planner.profile_types import with_types
from planner.question import Here, Question
from planner.simulate import step_seconds
from planner.streamed import step_seconds as streamed_seconds
from planner.ways import HYBRID

EXPECTED_ACCEPTANCE = 0.6  # of a draft model whose acceptance was not measured yet
MOST_DRAFTS = 16
DEPTH_TOKENS = 256  # of context that a pass is predicted behind
NEW_SHARE = 0.5  # of the newest run in what is learned


def pass_ratios(question: Question, plan: Plan, most_tokens: int) -> list[float]:
    """Time of a pass over 1, 2, ... `most_tokens` tokens, all with logits, over that of one token; never falling.

    `plan` answers `question`, which is about this machine.
    """
    take = _pass_taker(question, plan)
    seconds = [take(tokens) for tokens in range(1, most_tokens + 1)]
    ratios: list[float] = []
    for each in seconds:
        ratios.append(max(each / seconds[0], ratios[-1] if ratios else 1.0))
    return ratios


def best_turn(
    acceptance: float, draft_s: float, verify_s: Callable[[int], float], most: int, *, apart: bool
) -> tuple[int, float]:
    """Drafts a turn, and the tokens a second they promise; (0, plain decoding's) where none pay.

    `apart`: drafts are made on a device of their own, which goes on from its guess while the target verifies: where
    all drafts and the guess are right, the next ones are there by then.
    """
    best = 0, 1 / verify_s(1)
    for drafts in range(1, most + 1):
        drafting, verifying = drafts * draft_s, verify_s(drafts + 1)
        if apart:
            verifying = max(verifying, (drafts + 1) * draft_s)
            drafting *= 1 - acceptance ** (drafts + 1)
        rate = expected_tokens([acceptance] * drafts) / (drafting + verifying)
        if rate > best[1]:
            best = drafts, rate
    return best


def learned_acceptance(profile: Profile, target: str, draft: str) -> LearnedAcceptance | None:
    """What earlier runs told of a draft for a target, both named by what the profile keeps models under."""
    return profile.acceptances.get(_key(target, draft))


def record_acceptance(target: str, draft: str, rate: float) -> Profile:
    """Keep how often a draft was right in a run, the newest run weighing half; ValueError for no share."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"an acceptance of {rate}")
    profile = load_or_measure()
    old = profile.acceptances.get(_key(target, draft), LearnedAcceptance(rate, 0))
    new = LearnedAcceptance(old.rate + NEW_SHARE * (rate - old.rate), old.runs + 1)
    profile = replace(profile, acceptances={**profile.acceptances, _key(target, draft): new})
    save(profile)
    return profile


def _key(target: str, draft: str) -> str:
    return f"{target}|{draft}"


def _pass_taker(question: Question, plan: Plan) -> Callable[[int], float]:
    """From a number of tokens to the seconds of a pass over them."""
    shape, settings = question.shape, plan.settings
    assert isinstance(question.place, Here), "drafts are planned for this machine"
    profile = with_types(question.place.profile, shape, settings.weights_form)
    if settings.loop == HYBRID:
        here = replace(question, place=replace(question.place, profile=profile), budget=plan.budget)
        run = hybrid_run(here, settings, plan.placements)
        return lambda tokens: step_seconds(*run.step(tokens=tokens, depth=DEPTH_TOKENS))
    streaming = streaming_here(shape, profile, question.model, settings)

    def taken(tokens: int) -> float:
        """Behind some context, with logits of every token."""
        computing, experts_s = pass_seconds(shape, profile, settings, tokens, DEPTH_TOKENS, logits=tokens)
        if streaming is None:
            return computing
        return sum(streamed_seconds(shape, computing, streaming, settings, tokens, experts_s=experts_s).values())

    return taken
