"""The hybrids that fit a machine: with all in memory, and with experts on flash where RAM cannot hold them.

Knows nothing about speed beyond what splits are chosen by.
"""

from collections.abc import Callable, Iterator

from offload.tiers import Device, Tier
from planner.drive import drive_known
from planner.hybrid import chunk_that_fits, fit_hybrid
from planner.hybrid_memory import kv_limits
from planner.hybrid_streamed import fit_streamed_hybrid
from planner.machine import Machine
from planner.memory import fits, memory_needs
from planner.model_shape import UnitKind
from planner.plan import WeightsForm
from planner.profile import Profile
from planner.question import Question
from planner.spread import machine_of
from planner.ways import MIN_CHUNK_TOKENS, Fit

LEAST_CONTEXT_TOKENS = 64
MUCH_KV = 4  # the share of the GPU's memory from which on less of the caches is considered: a quarter


def fit_hybrids(question: Question, device: str, threads: int, wanted: int, *, may_be_shorter: bool) -> list[Fit]:
    """The hybrids of the wanted context, or of half, a quarter and so on of it.

    Where RAM cannot hold the experts that the GPU has too, also the one that reads from flash what neither holds; where
    the GPU cannot hold all caches, also those that leave older tokens of them in RAM.
    """
    machine = machine_of(question)
    if machine.gpu is None:
        return []
    context = wanted
    while True:
        options = {"threads": threads, "context_tokens": context}
        found = [fit_hybrid(question, machine, device, **options)]
        found += _in_parts(question, machine, device, found[0], **options)
        if found[0] is None or len(_tiers_of_experts(found[0])) > 1:
            found.append(fit_streamed_hybrid(question, machine, device, **options))
        fitting = [fit for fit in found if fit is not None]
        if fitting or not may_be_shorter or context // 2 < LEAST_CONTEXT_TOKENS:
            return fitting
        context //= 2


def quickest_in_parts(fits: list[Fit], seconds: Callable[[Fit], float]) -> list[Fit]:
    """`fits`, but of those that differ in how much of its caches the GPU holds only the one that takes least.

    By `seconds` far into the context: behind a short prompt less of the caches always seems enough.
    """
    alike = [fit for fit in fits if not fit.way.streams]
    if len(alike) < 2:
        return fits
    best = min(alike, key=seconds)
    return [fit for fit in fits if fit.way.streams or fit is best]


def _in_parts(
    question: Question, machine: Machine, device: str, whole: Fit | None, *, threads: int, context_tokens: int
) -> Iterator[Fit]:
    """Hybrids of which the GPU has a part of its layers' caches, where `whole` leaves other parts to the CPU."""
    if whole is not None and not _leaves_parts(whole):
        return
    for most in kv_limits(context_tokens, chunk_that_fits(question, context_tokens)):
        options = {"threads": threads, "context_tokens": context_tokens, "gpu_kv_tokens": most}
        fit = fit_hybrid(question, machine, device, **options)
        if fit is not None and any(one.kind is UnitKind.KV and one.device is Device.GPU for one in fit.placements):
            yield fit


def _leaves_parts(fit: Fit) -> bool:
    """Whether the CPU computes what the GPU could if caches took less: where they take much."""
    much = fit.needs.gpu.kv_bytes * MUCH_KV >= fit.needs.gpu.needed_bytes
    kinds = {one.kind for one in fit.placements if one.device is Device.CPU}
    return UnitKind.KV in kinds or (much and bool(kinds - {UnitKind.EMBEDDING, UnitKind.OTHER}))


def _tiers_of_experts(fit: Fit) -> set[Tier]:
    return {placement.tier for placement in fit.placements if placement.kind is UnitKind.EXPERTS}


def with_drive_of_experts(question: Question, profile: Profile) -> Profile:
    """`profile` with the model's drive, where experts may have to be read because RAM does not hold the model."""
    shape, budget = question.shape, question.budget
    tokens = {"context_tokens": LEAST_CONTEXT_TOKENS, "chunk_tokens": MIN_CHUNK_TOKENS}
    if not shape.expert_count or fits(memory_needs(shape, budget, Device.CPU, WeightsForm.PACKED, **tokens), budget):
        return profile
    return drive_known(profile, question.model)
