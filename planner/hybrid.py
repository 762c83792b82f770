"""Puts parts of a model on a GPU and leaves the rest to the CPU, within both memories: what the hybrid executor runs.

What a chunk of a prompt needs is reserved first; then dense parts, slots for experts, KV caches and the output head
compete for what is left of the GPU's memory by the time they save. Knows nothing about how problems are solved.

Invariant: needs are within the budget in both memories.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from offload.tiers import Device
from planner.budget import Budget
from planner.gpu_choice import is_simulated
from planner.greedy import solve_greedy
from planner.hybrid_flash import flash_loads
from planner.hybrid_items import HybridProblem, hybrid_problem
from planner.hybrid_memory import gpu_activations_bytes, reserved, with_gpu_in_ram
from planner.hybrid_needs import BROUGHT_SHARE, needs_of, placements_of, slot_bytes
from planner.hybrid_parts import parts, ram_bytes
from planner.hybrid_spill import HostKV, cold_byte_seconds
from planner.hybrid_split import Split, split_by_names, split_of
from planner.kv_spill import Spilling
from planner.machine import Machine
from planner.memory import fits
from planner.model_shape import ModelShape
from planner.placement import Assignment, PlacementProblem
from planner.plan import Objective, Plan
from planner.question import Question
from planner.simulate import step_seconds
from planner.solvers import best_assignment
from planner.streamed import all_slots
from planner.ways import HYBRID, HYBRID_WAY, MIN_CHUNK_TOKENS, PREFILL_CHUNK_TOKENS, SPILLED_HYBRID_WAY, Fit

ACTIVATIONS_SHARE = 1 / 8  # of the GPU's memory: a chunk that needs more is halved, as long as it is no small one


def fit_hybrid(
    question: Question,
    machine: Machine,
    device: str,
    *,
    threads: int,
    context_tokens: int,
    gpu_kv_tokens: int | None = None,
    spilling: Spilling | None = None,
) -> Fit | None:
    """The split that is predicted to be best; None where nothing would be on the GPU, or RAM cannot hold the rest.

    `gpu_kv_tokens`: that the GPU holds of a cache, older ones being in RAM; None: all. `spilling`: of what it does not
    hold RAM has so much at most, and flash the rest; None: RAM has all.
    """
    shape, budget = question.shape, question.budget
    chunk = chunk_that_fits(question, context_tokens)
    tokens = {"context_tokens": context_tokens, "chunk_tokens": chunk}
    fixed = reserved(shape, budget, device, **tokens, in_parts=gpu_kv_tokens is not None)
    gpu_room = budget.gpu_bytes - fixed.gpu.needed_bytes
    if gpu_room <= 0:
        return None
    fixed = with_gpu_in_ram(fixed, device)
    ram_room = budget.ram_bytes - fixed.ram.needed_bytes
    read_s = 0.0
    if spilling is not None:
        least = min(HostKV.of(shape, Split(), context_tokens).least_bytes, spilling.ram_bytes)
        weights_bytes = sum(ram_bytes(unit) for part in parts(shape) for unit in part.units)
        left = ram_room - max(weights_bytes - gpu_room, 0)
        expected = replace(spilling, ram_bytes=max(min(left, spilling.ram_bytes), least))
        read_s = cold_byte_seconds(shape, expected, context_tokens // 2)
        ram_room -= least
    for divides in (True, False) if shape.expert_count else (False,):
        found = hybrid_problem(
            shape,
            machine,
            threads=threads,
            context_tokens=context_tokens,
            chunk_tokens=chunk,
            objective=question.wish.objective,
            ram_bytes=ram_room,
            gpu_bytes=gpu_room,
            divides=divides,
            gpu_is_ram=is_simulated(device),
            gpu_kv_tokens=gpu_kv_tokens,
            cold_byte_s=read_s if spilling is not None else None,
        )
        split = best_split(shape, budget, found, is_asked=question.wish.loop == HYBRID)
        if split is None:
            continue
        split = replace(split, kv_tokens=gpu_kv_tokens)
        kept = None
        if spilling is not None:
            host = HostKV.of(shape, split, context_tokens)
            bare = needs_of(shape, budget, device, split, **tokens, kv_ram_bytes=0)
            kept = min(budget.ram_bytes - bare.ram.needed_bytes, host.all_bytes, spilling.ram_bytes)
            if kept < host.least_bytes:
                continue
            kept = kept or None  # the GPU holds all
        needs = needs_of(shape, budget, device, split, **tokens, kv_ram_bytes=kept)
        if fits(needs, budget):
            return Fit(
                HYBRID_WAY if kept is None else SPILLED_HYBRID_WAY,
                context_tokens,
                chunk,
                needs,
                gpu_slots=split.slots,
                gpu_kv_tokens=gpu_kv_tokens,
                kv_ram_bytes=kept,
                placements=tuple(placements_of(shape, split, context_tokens, kv_ram_bytes=kept)),
            )
    return None


def hybrid_choice(question: Question, machine: Machine, plan: Plan) -> tuple[PlacementProblem, Assignment]:
    """The problem of one token's step that a hybrid plan answers, and its answer.

    Where experts share slots, as many of each layer's classes as there are slots for.
    """
    shape, settings = question.shape, plan.settings
    split = split_of(shape, plan.placements, settings.gpu_slots, settings.gpu_kv_tokens)
    layers = split.cached_layers(shape)
    ram, gpu = plan.needs.ram, plan.needs.gpu
    flash = flash_loads(shape, machine, settings.threads) if settings.stream_slots else None
    spills = settings.kv_ram_bytes is not None
    kv_bytes = 0 if spills else ram.kv_bytes
    found = hybrid_problem(
        shape,
        machine,
        threads=settings.threads,
        context_tokens=settings.context_tokens,
        chunk_tokens=settings.prefill_chunk_tokens,
        objective=Objective.LATENCY,
        ram_bytes=plan.budget.ram_bytes - ram.needed_bytes + ram.weights_bytes + ram.slots_bytes + kv_bytes,
        gpu_bytes=plan.budget.gpu_bytes - gpu.needed_bytes + gpu.weights_bytes + gpu.slots_bytes + gpu.kv_bytes,
        divides=bool(layers) or flash is not None,
        flash=flash,
        gpu_kv_tokens=settings.gpu_kv_tokens,
        cold_byte_s=0.0 if spills else None,
    )
    share = split.cache_slots(shape) / max(len(layers) * shape.expert_count, 1)
    in_ram = settings.stream_slots / max(all_slots(shape) - len(split.resident) * shape.expert_count, 1)
    classes = Counter(item.layer for item in found.problem.items if item.routed)
    seen: Counter[int | None] = Counter()
    owners = {part.name: part for part in parts(shape)}
    chosen = []
    for item in found.problem.items:
        others = 0
        if item.routed and item.layer not in split.resident:
            of_gpu = share if item.layer in layers else 0.0
            number, seen[item.layer] = seen[item.layer], seen[item.layer] + 1
            on_gpu = number < round(of_gpu * classes[item.layer])
            others = int(flash is not None and number < round((of_gpu + in_ram) * classes[item.layer]))
        else:
            on_gpu = split.device(owners[item.name.partition("#")[0]]) is Device.GPU
        chosen.append(len(item.options) - 1 if on_gpu else others)
    return found.problem, tuple(chosen)


def chunk_that_fits(question: Question, context_tokens: int) -> int:
    """The longest chunk of a prompt whose activations leave most of the GPU's memory to others."""
    chunk = min(PREFILL_CHUNK_TOKENS, context_tokens)
    room = ACTIVATIONS_SHARE * question.budget.gpu_bytes
    while chunk > MIN_CHUNK_TOKENS and gpu_activations_bytes(question.shape, chunk, context_tokens) > room:
        chunk = max(chunk // 2, MIN_CHUNK_TOKENS)
    return chunk


def best_split(shape: ModelShape, budget: Budget, found: HybridProblem, *, is_asked: bool) -> Split | None:
    """The quickest split that the solvers find; None where it leaves the GPU idle, or nothing fits.

    Where a hybrid `is_asked` for, the quickest that does not leave it idle.
    """
    solution = best_assignment(found.problem)
    if solution is None:
        return None
    split = _quickest(shape, budget, found, [solution.assignment])
    return _quickest(shape, budget, found, solve_greedy(found.problem)) if split is None and is_asked else split


def _quickest(
    shape: ModelShape, budget: Budget, found: HybridProblem, assignments: Sequence[Assignment]
) -> Split | None:
    """The quickest of what can be made of the assignments, if it leaves something to the GPU."""
    made = [make(assignment) for assignment in assignments for make in (found.repaired, found.completed)]
    fitting = sorted(
        (assignment for assignment in made if found.problem.fits(assignment)),
        key=lambda assignment: step_seconds(found.problem, assignment),
    )
    splits = (_split(shape, budget, found, assignment) for assignment in fitting)
    return next((split for split in splits if split is not None), None)


def _split(shape: ModelShape, budget: Budget, found: HybridProblem, assignment: Assignment) -> Split | None:
    """The split of an assignment: classes of experts become slots, and what memory is left becomes more of them.

    Only where all experts of every layer find room, or RAM has none, they lie in the GPU's memory alone.
    """
    problem = found.problem
    chosen = list(zip(problem.items, problem.chosen(assignment), strict=True))
    on_gpu = [item.name for item, option in chosen if not item.routed and option.device is Device.GPU]
    split = split_by_names(shape, on_gpu, 0)
    if split.is_empty:
        return None
    routed = [(item.layer, option) for item, option in chosen if item.routed and item.layer is not None]
    divided = {layer for layer, option in routed if option.device is Device.CPU}
    feeding = split.cached_layers(shape)
    if not (found.divides and feeding & divided):  # slots may change hands only where RAM has the experts too
        resident = frozenset(layer for layer, _ in routed) - divided
        return replace(split, resident=resident, slots=len(resident) * shape.expert_count)
    of_classes = sum(option.gpu_bytes for _, option in routed)
    room = of_classes + found.gpu_bytes_left(assignment) - int(BROUGHT_SHARE * budget.gpu_bytes) if of_classes else 0
    most = len(feeding) * shape.expert_count
    slots = max(min(room // slot_bytes(shape, feeding), most), 0)
    return replace(split, resident=feeding if slots == most else frozenset(), slots=slots)
