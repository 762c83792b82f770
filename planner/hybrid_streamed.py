"""Hybrid plans of models whose experts neither memory holds all of: RAM has places for some, and flash the rest.

The GPU's places, RAM's and what else lies in both are found together; what RAM has left then becomes places. Knows
nothing about how problems are solved.

Invariant: needs are within the budget in both memories.
"""

from dataclasses import replace

from planner.gpu_choice import is_simulated
from planner.hybrid import best_split, chunk_that_fits
from planner.hybrid_flash import flash_loads
from planner.hybrid_items import hybrid_problem
from planner.hybrid_memory import reserved, with_gpu_in_ram
from planner.hybrid_needs import needs_of, placements_of, with_readers
from planner.machine import Machine
from planner.memory import fits
from planner.question import Question
from planner.streamed import all_slots, least_slots
from planner.ways import HYBRID, STREAMED_HYBRID_WAY, Fit


def fit_streamed_hybrid(
    question: Question,
    machine: Machine,
    device: str,
    *,
    threads: int,
    context_tokens: int,
    gpu_kv_tokens: int | None = None,
) -> Fit | None:
    """The split that is predicted to be best where RAM has places for some experts, and flash the rest.

    None where nothing would be on the GPU, the drive is not known, or RAM has no room for what a step needs at once.
    `gpu_kv_tokens`: see `fit_hybrid`.
    """
    shape, budget = question.shape, question.budget
    loads = flash_loads(shape, machine, threads)
    if loads is None or not shape.expert_count:
        return None
    chunk = chunk_that_fits(question, context_tokens)
    while True:
        tokens = {"context_tokens": context_tokens, "chunk_tokens": chunk}
        least = least_slots(shape, chunk)
        needed = reserved(shape, budget, device, **tokens, in_parts=gpu_kv_tokens is not None)
        fixed = with_gpu_in_ram(with_readers(needed), device)
        found = hybrid_problem(
            shape,
            machine,
            threads=threads,
            **tokens,
            objective=question.wish.objective,
            ram_bytes=budget.ram_bytes - fixed.ram.needed_bytes - least * loads.slot_bytes,
            gpu_bytes=budget.gpu_bytes - fixed.gpu.needed_bytes,
            divides=True,
            gpu_is_ram=is_simulated(device),
            flash=loads,
            gpu_kv_tokens=gpu_kv_tokens,
        )
        split = None
        if min(found.problem.ram_bytes, found.problem.gpu_bytes) >= 0:
            split = best_split(shape, budget, found, is_asked=question.wish.loop == HYBRID)
        if split is not None:
            split = replace(split, kv_tokens=gpu_kv_tokens)
            bare = needs_of(shape, budget, device, split, **tokens, stream_slots=1)
            free = budget.ram_bytes - bare.ram.needed_bytes
            most = all_slots(shape) - len(split.resident) * shape.expert_count
            slots = min(1 + free // loads.slot_bytes, most)
            needs = needs_of(shape, budget, device, split, **tokens, stream_slots=slots)
            if slots >= min(least, most) and slots > 0 and fits(needs, budget):
                placed = tuple(placements_of(shape, split, context_tokens, streams=True))
                counts = {"stream_slots": slots, "gpu_slots": split.slots}
                fit = Fit(STREAMED_HYBRID_WAY, context_tokens, chunk, needs, placements=placed, **counts)
                return replace(fit, gpu_kv_tokens=gpu_kv_tokens)
        if chunk == 1:
            return None
        chunk //= 2
