"""Puts parts of a model on a GPU and leaves the rest to the CPU, within both memories: what the hybrid executor runs.

What a chunk of a prompt needs is reserved first; then dense parts, slots for experts, KV caches and the output head
compete for what is left of the GPU's memory by the time they save. Knows nothing about how problems are solved.

Invariant: needs are within the budget in both memories.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from offload.flash import DEPTH
from offload.memory import HUGE_PAGE_BYTES
from offload.tiers import Device, Tier
from planner.budget import Budget
from planner.gpu_choice import is_simulated
from planner.greedy import solve_greedy
from planner.hybrid_flash import flash_loads
from planner.hybrid_items import HybridProblem, hybrid_problem
from planner.hybrid_memory import (
    buffers_bytes,
    gpu_activations_bytes,
    kv_tokens,
    ram_kv_tokens,
    reserved,
    with_gpu_in_ram,
)
from planner.hybrid_parts import gpu_bytes, parts, ram_bytes
from planner.hybrid_split import Split, split_by_names, split_of
from planner.machine import Machine
from planner.memory import fits
from planner.model_shape import ModelShape, UnitKind
from planner.placement import Assignment, PlacementProblem
from planner.plan import MemoryNeeds, Needs, Objective, Placement, Plan
from planner.question import Question
from planner.simulate import step_seconds
from planner.solvers import best_assignment
from planner.streamed import all_slots
from planner.streamed import slot_bytes as ram_slot_bytes
from planner.ways import HYBRID, HYBRID_WAY, MIN_CHUNK_TOKENS, PREFILL_CHUNK_TOKENS, Fit

BROUGHT_SHARE = 1 / 16  # of the GPU's memory, for experts that are brought for a step
ACTIVATIONS_SHARE = 1 / 8  # of the GPU's memory: a chunk that needs more is halved, as long as it is no small one


def fit_hybrid(
    question: Question,
    machine: Machine,
    device: str,
    *,
    threads: int,
    context_tokens: int,
    gpu_kv_tokens: int | None = None,
) -> Fit | None:
    """The split that is predicted to be best; None where nothing would be on the GPU, or RAM cannot hold the rest.

    `gpu_kv_tokens`: that the GPU holds of a cache, older ones being in RAM; None: all.
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
        )
        split = best_split(shape, budget, found, is_asked=question.wish.loop == HYBRID)
        if split is None:
            continue
        split = replace(split, kv_tokens=gpu_kv_tokens)
        needs = needs_of(shape, budget, device, split, **tokens)
        if fits(needs, budget):
            placed = tuple(placements_of(shape, split, context_tokens))
            fit = Fit(HYBRID_WAY, context_tokens, chunk, needs, gpu_slots=split.slots, placements=placed)
            return replace(fit, gpu_kv_tokens=gpu_kv_tokens)
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
    found = hybrid_problem(
        shape,
        machine,
        threads=settings.threads,
        context_tokens=settings.context_tokens,
        chunk_tokens=settings.prefill_chunk_tokens,
        objective=Objective.LATENCY,
        ram_bytes=plan.budget.ram_bytes - ram.needed_bytes + ram.weights_bytes + ram.slots_bytes + ram.kv_bytes,
        gpu_bytes=plan.budget.gpu_bytes - gpu.needed_bytes + gpu.weights_bytes + gpu.slots_bytes + gpu.kv_bytes,
        divides=bool(layers) or flash is not None,
        flash=flash,
        gpu_kv_tokens=settings.gpu_kv_tokens,
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


def placements_of(
    shape: ModelShape, split: Split, context_tokens: int, *, streams: bool = False
) -> Iterator[Placement]:
    """Every unit, and the KV cache of every layer, where the split holds it; `streams`: the CPU's experts on flash."""
    for part in parts(shape):
        device = split.device(part)
        away = Tier.FLASH if streams and part.kind is UnitKind.EXPERTS else Tier.RAM
        tier = Tier.GPU if device is Device.GPU else away
        for unit in part.units:
            num_bytes = gpu_bytes(unit) if device is Device.GPU else unit.num_bytes
            yield Placement(unit.name, unit.kind, unit.layer, num_bytes, tier, device)
        if part.kind is UnitKind.ATTENTION and part.layer is not None:
            most = split.kv_tokens if device is Device.GPU and split.kv_tokens is not None else context_tokens
            held = part.kv_bytes * min(most, context_tokens)
            yield Placement(f"blk.{part.layer}.kv", UnitKind.KV, part.layer, held, tier, device)


def needs_of(
    shape: ModelShape,
    budget: Budget,
    device: str,
    split: Split,
    *,
    context_tokens: int,
    chunk_tokens: int,
    stream_slots: int = 0,
) -> Needs:
    """What a split needs of both memories, margins included; `stream_slots`: of RAM, where it has not all experts."""
    in_parts = split.kv_tokens is not None
    fixed = reserved(shape, budget, device, context_tokens=context_tokens, chunk_tokens=chunk_tokens, in_parts=in_parts)
    if stream_slots:
        fixed = with_readers(fixed)
    ram = replace(fixed.ram, slots_bytes=stream_slots * ram_slot_bytes(shape) if stream_slots else 0)
    gpu = fixed.gpu
    for part in parts(shape):
        if stream_slots and part.kind is UnitKind.EXPERTS and split.device(part) is Device.CPU:
            continue
        if split.device(part) is Device.GPU:
            gpu = _with(gpu, part.gpu_bytes, part.kv_bytes * kv_tokens(context_tokens, split.kv_tokens))
            ram = _with(ram, 0, part.kv_bytes * ram_kv_tokens(context_tokens, split.kv_tokens))
        else:
            ram = _with(ram, sum(map(ram_bytes, part.units)), part.kv_bytes * context_tokens)
    layers = split.cached_layers(shape)
    slots = split.cache_slots(shape) + kinds_of_experts(shape) * brought_slots(shape, budget, split)
    slots_bytes = slots * slot_bytes(shape, layers)
    tokens = min(chunk_tokens, context_tokens)
    activations = gpu_activations_bytes(shape, tokens, context_tokens, split, in_parts=in_parts)
    gpu = replace(
        gpu,
        slots_bytes=slots_bytes,
        activations_bytes=activations,
        buffers_bytes=buffers_bytes(shape, split, activations + slots_bytes + gpu.kv_bytes),
    )
    return with_gpu_in_ram(Needs(ram=ram, gpu=gpu), device)


def brought_slots(shape: ModelShape, budget: Budget, split: Split) -> int:
    """Places, for every kind of layer, for experts that are brought for a step; 0 where none would be."""
    layers = split.cached_layers(shape)
    if not layers or not split.cache_slots(shape):
        return 0
    room = int(BROUGHT_SHARE * budget.gpu_bytes) // kinds_of_experts(shape)
    return min(room // slot_bytes(shape, layers), shape.expert_count)


def kinds_of_experts(shape: ModelShape) -> int:
    """How many kinds of layers there are by the quant types of their experts."""
    experts = (unit for unit in shape.units if unit.kind is UnitKind.EXPERTS)
    return max(len({tuple(name for name, _ in unit.active_bytes_by_type) for unit in experts}), 1)


def slot_bytes(shape: ModelShape, layers: frozenset[int]) -> int:
    """What a slot takes that any expert of these layers fits in."""
    of_layers = (unit.num_bytes for unit in shape.units if unit.kind is UnitKind.EXPERTS and unit.layer in layers)
    return -(-max(of_layers, default=0) // max(shape.expert_count, 1))


def chunk_that_fits(question: Question, context_tokens: int) -> int:
    """The longest chunk of a prompt whose activations leave most of the GPU's memory to others."""
    chunk = min(PREFILL_CHUNK_TOKENS, context_tokens)
    room = ACTIVATIONS_SHARE * question.budget.gpu_bytes
    while chunk > MIN_CHUNK_TOKENS and gpu_activations_bytes(question.shape, chunk, context_tokens) > room:
        chunk = max(chunk // 2, MIN_CHUNK_TOKENS)
    return chunk


def with_readers(fixed: Needs) -> Needs:
    """`fixed` with the memory through which experts come from flash: for the CPU's, and for the GPU's."""
    buffers_bytes = fixed.ram.buffers_bytes + 2 * DEPTH * HUGE_PAGE_BYTES
    return replace(fixed, ram=replace(fixed.ram, buffers_bytes=buffers_bytes))


def _with(memory: MemoryNeeds, weights_bytes: int, kv_bytes: int) -> MemoryNeeds:
    return replace(memory, weights_bytes=memory.weights_bytes + weights_bytes, kv_bytes=memory.kv_bytes + kv_bytes)


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
