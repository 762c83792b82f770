"""The hybrids that fit a machine: with all in memory, and with experts on flash where RAM cannot hold them.

Knows nothing about speed beyond what splits are chosen by.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from offload.tiers import Device, Tier
from planner.drive import drive_known
from planner.folders import spill_folder
from planner.hybrid import chunk_that_fits, fit_hybrid
from planner.hybrid_memory import kv_limits
from planner.hybrid_streamed import fit_streamed_hybrid
from planner.kv_spill import Spilling
from planner.machine import Machine
from planner.memory import fits, memory_needs
from planner.model_shape import UnitKind
from planner.plan import WeightsForm
from planner.profile import Profile
from planner.profile_spill import spill_rates
from planner.question import Here, Question
from planner.spread import machine_of
from planner.ways import MIN_CHUNK_TOKENS, Fit

LEAST_CONTEXT_TOKENS = 64
MUCH_KV = 4  # the share of the GPU's memory from which on less of the caches is considered: a quarter


def fit_hybrids(
    question: Question, device: str, threads: int, wanted: int, *, may_be_shorter: bool, may_spill: bool
) -> list[Fit]:
    """The hybrids of the wanted context, or of half, a quarter and so on of it.

    Where RAM cannot hold the experts that the GPU has too, also the one that reads from flash what neither holds; where
    the GPU cannot hold all caches, also those that leave older tokens of them in RAM. Where none fits and they
    `may_spill`, or RAM for keys and values is limited, those that have a part of these on flash.
    """
    machine = machine_of(question)
    if machine.gpu is None:
        return []
    place, context = _Place(question, machine, device, threads), wanted
    while True:
        found = [] if question.wish.kv_ram_bytes is not None else _in_memory(place, context)
        if not found and (may_spill or question.wish.kv_ram_bytes is not None):
            spilling = _spilling(question)
            found = [] if spilling is None else place.fits(partial(place.fit, context, spilling), context)
        if found or not may_be_shorter or context // 2 < LEAST_CONTEXT_TOKENS:
            return found
        context //= 2


@dataclass(frozen=True, slots=True)
class _Place:
    """What is to be fitted, and on what."""

    question: Question
    machine: Machine
    device: str
    threads: int

    def fit(self, context_tokens: int, spilling: Spilling | None, gpu_kv_tokens: int | None = None) -> Fit | None:
        """See `fit_hybrid`."""
        return fit_hybrid(
            *(self.question, self.machine, self.device),
            threads=self.threads,
            context_tokens=context_tokens,
            gpu_kv_tokens=gpu_kv_tokens,
            spilling=spilling,
        )

    def streamed(self, context_tokens: int, gpu_kv_tokens: int | None = None) -> Fit | None:
        """See `fit_streamed_hybrid`."""
        return fit_streamed_hybrid(
            *(self.question, self.machine, self.device),
            threads=self.threads,
            context_tokens=context_tokens,
            gpu_kv_tokens=gpu_kv_tokens,
        )

    def fits(self, fit: Callable[[int | None], Fit | None], context_tokens: int) -> list[Fit]:
        """With the GPU's caches there as a whole, and in parts where that leaves other parts to the CPU."""
        whole = fit(None)
        found = [] if whole is None else [whole]
        if whole is None or _leaves_parts(whole):
            limits = kv_limits(context_tokens, chunk_that_fits(self.question, context_tokens))
            found += [part for part in map(fit, limits) if part is not None and _has_cache(part)]
        return found


def _in_memory(place: _Place, context_tokens: int) -> list[Fit]:
    """With all keys and values in memory."""
    found = place.fits(partial(place.fit, context_tokens, None), context_tokens)
    whole = next((fit for fit in found if fit.gpu_kv_tokens is None), None)
    if whole is None or len(_tiers_of_experts(whole)) > 1:
        found += place.fits(partial(place.streamed, context_tokens), context_tokens)
    return found


def _spilling(question: Question) -> Spilling | None:
    """How fast the drive is where plans are made for it, and what of RAM keys and values may take."""
    if not isinstance(question.place, Here):
        return None
    limit = question.wish.kv_ram_bytes
    return Spilling(spill_rates(question.place.profile, spill_folder()), sys.maxsize if limit is None else limit)


def quickest_in_parts(fits: list[Fit], seconds: Callable[[Fit], float]) -> list[Fit]:
    """`fits`, but of those that differ in how much of its caches the GPU holds only the one that takes least.

    By `seconds` far into the context: behind a short prompt less of the caches always seems enough.
    """
    kept = []
    for streams in (False, True):
        alike = [fit for fit in fits if fit.way.streams is streams]
        kept += [min(alike, key=seconds)] if len(alike) > 1 else alike
    return kept


def _has_cache(fit: Fit) -> bool:
    """Whether the GPU has keys and values."""
    return any(one.kind is UnitKind.KV and one.device is Device.GPU for one in fit.placements)


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
