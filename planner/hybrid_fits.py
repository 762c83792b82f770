"""The hybrids that fit a machine: with all in memory, and with experts on flash where RAM cannot hold them.

Knows nothing about speed beyond what splits are chosen by.
"""

from offload.tiers import Device, Tier
from planner.drive import drive_known
from planner.hybrid import fit_hybrid
from planner.hybrid_streamed import fit_streamed_hybrid
from planner.memory import fits, memory_needs
from planner.model_shape import UnitKind
from planner.plan import WeightsForm
from planner.profile import Profile
from planner.question import Question
from planner.spread import machine_of
from planner.ways import MIN_CHUNK_TOKENS, Fit

LEAST_CONTEXT_TOKENS = 64


def fit_hybrids(question: Question, device: str, threads: int, wanted: int, *, may_be_shorter: bool) -> list[Fit]:
    """The hybrids of the wanted context, or of half, a quarter and so on of it.

    Where RAM cannot hold the experts that the GPU has too, also the one that reads from flash what neither holds.
    """
    machine = machine_of(question)
    if machine.gpu is None:
        return []
    context = wanted
    while True:
        options = {"threads": threads, "context_tokens": context}
        found = [fit_hybrid(question, machine, device, **options)]
        if found[0] is None or len(_tiers_of_experts(found[0])) > 1:
            found.append(fit_streamed_hybrid(question, machine, device, **options))
        fitting = [fit for fit in found if fit is not None]
        if fitting or not may_be_shorter or context // 2 < LEAST_CONTEXT_TOKENS:
            return fitting
        context //= 2


def _tiers_of_experts(fit: Fit) -> set[Tier]:
    return {placement.tier for placement in fit.placements if placement.kind is UnitKind.EXPERTS}


def with_drive_of_experts(question: Question, profile: Profile) -> Profile:
    """`profile` with the model's drive, where experts may have to be read because RAM does not hold the model."""
    shape, budget = question.shape, question.budget
    tokens = {"context_tokens": LEAST_CONTEXT_TOKENS, "chunk_tokens": MIN_CHUNK_TOKENS}
    if not shape.expert_count or fits(memory_needs(shape, budget, Device.CPU, WeightsForm.PACKED, **tokens), budget):
        return profile
    return drive_known(profile, question.model)
