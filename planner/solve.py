"""Finds a plan: where every unit goes so that all of it fits, or the reason why nothing does.

For this machine, the best of what this version executes: see `planner.executed`. For a described machine, every
placement that could be: see `planner.described`. Refuses before anything is loaded. Reads no tensor data.

Invariant: a plan's needs, margins included, are within its budget in every memory.
"""

from dataclasses import replace

from cpu_kernels.kv_policy import KVPolicy
from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import DoesNotFitError
from offload.gguf import GGUFFile
from planner.budget import Budget, measure_budget
from planner.described import plan_described, with_other_tiers
from planner.draft_choice import DraftWish, with_draft
from planner.executed import plan_executed, predicted
from planner.gpu_choice import FOUND, chosen_gpu, gpu_text
from planner.kv_choice import choose_kv, with_fitting_types
from planner.machine import Machine
from planner.plan import Objective, Plan
from planner.profile import Profile, load_or_measure
from planner.question import Here, Question, Wish, ask
from planner.ways import AUTO, HYBRID, LLAMA_CPP, PROGRAM, SEQUENTIAL

__all__ = [
    "AUTO",
    "HYBRID",
    "LLAMA_CPP",
    "PROGRAM",
    "SEQUENTIAL",
    "for_prompt",
    "make_plan",
    "plan_here",
    "question_here",
    "solve",
    "solve_or_explain",
]


def plan_here(
    gguf: GGUFFile,
    *,
    context_tokens: int | None = None,
    threads: int | None = None,
    budget: Budget | None = None,
    loop: str = AUTO,
    prompt_tokens: int | None = None,
    objective: Objective = Objective.LATENCY,
    gpu: str = FOUND,
    kv: KVPolicy | None = None,
    kv_ram_bytes: int | None = None,
    kv_is_free: bool = False,
    drafts: DraftWish | None = None,
) -> Plan:
    """`make_plan` for this machine as it is now: GPU, profile and, where none is given, the budget are measured.

    With `drafts` the best of them is planned beside the model, or none.

    `gpu` is "off", "auto" for the one that is found, or the description of one that is simulated; RequestError for
    anything else.
    """
    wish = Wish(context_tokens, threads, prompt_tokens, loop, objective, kv or KVPolicy(), kv_ram_bytes, kv_is_free)
    return solve_with_drafts(question_here(gguf, wish, budget, gpu=chosen_gpu(gpu)), drafts)


def question_here(
    gguf: GGUFFile, wish: Wish, budget: Budget | None = None, *, gpu: GpuCapabilities | None = None
) -> Question:
    """What to ask of this machine as it is now, with that GPU."""
    wish.check()
    return ask(gguf, budget or measure_budget(gpu), Here(load_or_measure(), gpu), wish)


def make_plan(
    gguf: GGUFFile,
    *,
    budget: Budget,
    profile: Profile | None = None,
    machine: Machine | None = None,
    objective: Objective = Objective.LATENCY,
    context_tokens: int | None = None,
    threads: int | None = None,
    gpu: GpuCapabilities | None = None,
    loop: str = AUTO,
    prompt_tokens: int | None = None,
) -> Plan:
    """The plan for `gguf` within `budget`; `prompt_tokens` is the prompt length that speed is predicted for.

    For this machine by its `profile` and `gpu`, or for a described `machine`. A context of None is chosen: the trained
    one, at most 4096 tokens, less where memory is short. DoesNotFitError with what would fit, UnsupportedModelError for
    a quant type that cannot be computed with.
    """
    if machine is not None:
        place: Here | Machine = machine
    elif profile is not None:
        place = Here(profile, gpu)
    else:
        raise ValueError("a plan is for this machine, by its profile, or for a described machine")
    return solve(ask(gguf, budget, place, Wish(context_tokens, threads, prompt_tokens, loop, objective)))


def solve(question: Question) -> Plan:
    """The plan that answers a question; DoesNotFitError naming the nearest thing that fits."""
    return choose_kv(question, _solve) if question.wish.kv_is_free else _solve(question)


def _solve(question: Question) -> Plan:
    """The same for types of the KV cache that are given."""
    if isinstance(question.place, Machine):
        plan = plan_described(question, question.place)
    else:
        plan = plan_executed(question, question.place)
    plan.check()
    return plan


def solve_or_explain(question: Question) -> Plan:
    """`solve`, with a refusal that also says what other tiers of this machine would do, if it takes a moment longer."""
    try:
        return solve(question)
    except DoesNotFitError as error:
        if not question.wish.kv_is_free:
            error = with_fitting_types(error, question, _solve)
        if isinstance(question.place, Machine):
            raise error from error.__cause__
        raise with_other_tiers(error, question) from error


def solve_with_drafts(question: Question, drafts: DraftWish | None) -> Plan:
    """`solve_or_explain`, with the best of the drafts beside the model, or none."""
    plan = solve_or_explain(question)
    if drafts is None:
        return plan
    plan = with_draft(question, plan, drafts)
    plan.check()
    return plan


def for_prompt(plan: Plan, gguf: GGUFFile, prompt_tokens: int) -> Plan:
    """`plan` with its speed predicted for a prompt of `prompt_tokens`, from the profile as it is now."""
    question, settings = question_of(plan, gguf), plan.settings
    assert isinstance(question.place, Here), "it is of this machine"
    prompt = min(max(prompt_tokens, 1), settings.context_tokens)
    promise = predicted(question, question.place, settings, plan.needs, plan.placements, prompt)
    return replace(plan, predicted=promise)


def question_of(plan: Plan, gguf: GGUFFile) -> Question:
    """What a plan for this machine answers, with the profile as it is now and the GPU that the plan uses."""
    settings = plan.settings
    wish = Wish(
        settings.context_tokens,
        settings.threads,
        loop=settings.loop,
        objective=plan.objective,
        kv=settings.kv,
        kv_ram_bytes=settings.kv_ram_bytes,
    )
    return ask(gguf, plan.budget, Here(load_or_measure(), chosen_gpu(gpu_text(settings.device))), wish)
