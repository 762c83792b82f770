"""Chooses the draft together with the placement: which source, on which device, how deep, or none.

For every source that is allowed, and every device it may run on, its memory is set aside, the model is planned in what
is left, and the speed with drafts is predicted. Where the best of these is slower than the best plan without drafts,
no draft is loaded; one that the user named, and that displaces nothing, is loaded to be tried.
Knows nothing about files' contents. Invariant: target and draft together are within the budget in every memory.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload.errors import DoesNotFitError, StrataError
from planner import unit_cost
from planner.budget import GPU_PROCESS_RAM_BYTES, PACKED_PROCESS_BYTES, Budget, format_size
from planner.drafts import EXPECTED_ACCEPTANCE, best_turn, learned_acceptance, pass_ratios
from planner.executed import plan_executed
from planner.gpu_choice import is_simulated
from planner.hybrid_memory import TORCH_BYTES
from planner.machine_here import cpu_here
from planner.memory import GPU_PROCESS_BYTES
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Plan, PlannedModel
from planner.planned_draft import DraftKind, PlannedDraft
from planner.question import Here, Question, Wish
from planner.ways import AUTO, HYBRID, PROGRAM

log = logging.getLogger("strata.planner.drafts")

DRAFT_CONTEXT_TOKENS = 4096  # more of the sequence than that is seldom of use to a draft
DISPLACES = 0.99  # of the speed without drafts: a plan that is slower gave something up for the draft
LOOKUP_NAME = "n-gram"
ASSUMED, GIVEN = "assumed", "given"


@dataclass(frozen=True, slots=True)
class AllowedDraft:
    """A source that may be chosen: a model (`model`, `shape`), or a head, whose weights take `head_bytes`."""

    name: str
    path: str
    model: PlannedModel | None = None
    shape: ModelShape | None = None
    head_bytes: int = 0

    @property
    def key(self) -> str:
        """Names it in the profile, wherever its file lies."""
        return self.name if self.model is None else self.model.key


@dataclass(frozen=True, slots=True)
class DraftWish:
    """What a user allows: any of these sources, with lookup before them or alone, up to `most` tokens a turn.

    `is_named`: the user named the source. `is_forced`: it is to be loaded wherever it fits. `acceptance`: given.
    """

    sources: tuple[AllowedDraft, ...]
    looks_up: bool
    most: int
    is_named: bool = False
    is_forced: bool = False
    acceptance: float | None = None


def with_draft(question: Question, plain: Plan, wish: DraftWish, *, fixed: bool = False) -> Plan:
    """The plan with the best draft; `plain`, the best without, where none pays, which then says so.

    `fixed`: nothing of `plain` may be displaced; else the model may be placed anew beside a draft.
    """
    if plain.settings.loop not in (PROGRAM, HYBRID) or not isinstance(question.place, Here):
        return plain
    question = question.with_kv(plain.settings.kv)
    found = [plan for source in wish.sources for plan in _options(question, plain, source, wish, fixed=fixed)]
    best = max(found, key=_tokens_per_s, default=None)
    if best is not None and best.draft is not None and (wish.is_forced or _is_welcome(best, best.draft, wish)):
        return best
    declined = _declined(plain, wish, best) if wish.sources else None
    if not wish.looks_up:
        return replace(plain, draft=declined)
    notes = () if declined is None else (f"no draft model is loaded: {declined.declined}",)
    return replace(plain, draft=_lookup(plain, wish), notes=(*plain.notes, *notes))


def own_plan(source: AllowedDraft, draft: PlannedDraft, target: Plan, place: Here) -> Plan:
    """The plan by which the draft that was chosen runs, in what was set aside for it."""
    on_gpu = draft.device != "cpu"
    ram, gpu = _shared(target, draft.device)
    room = replace(
        _without_margins(target.budget),
        ram_bytes=draft.ram_bytes + ram,
        gpu_bytes=draft.gpu_bytes + gpu if on_gpu else 0,
    )
    return _draft_plan(source, place, room, draft.context_tokens, target.settings.threads, on_gpu=on_gpu)


def left_over(plan: Plan) -> Budget:
    """What a plan leaves of its budget for a second model in the same process."""
    return replace(
        _without_margins(plan.budget),
        ram_bytes=max(plan.budget.ram_bytes - plan.needs.ram.needed_bytes, 0),
        gpu_bytes=max(plan.budget.gpu_bytes - plan.needs.gpu.needed_bytes, 0),
    )


def _options(question: Question, plain: Plan, source: AllowedDraft, wish: DraftWish, *, fixed: bool) -> Iterator[Plan]:
    """Plans of the target beside this source, on each device that the source may run on."""
    assert isinstance(question.place, Here), "checked before"
    gpu = question.place.gpu
    devices = ["cpu"] if gpu is None or source.model is None else ["cpu", gpu.torch_device]
    for device in devices:
        for loop in _target_loops(question, plain, source, device, fixed=fixed):
            try:
                yield _beside(question, plain, source, device, loop, wish, fixed=fixed)
            except StrataError as error:  # it does not fit, or cannot be computed there: another choice may
                log.info("no draft by %s on %s beside the %s loop: %s", source.name, device, loop, error)


def _target_loops(
    question: Question, plain: Plan, source: AllowedDraft, device: str, *, fixed: bool
) -> tuple[str, ...]:
    """The loops to plan the target for: with the draft on the GPU, it may share it or leave it to the draft."""
    asked = plain.settings.loop if fixed else question.wish.loop
    if source.model is None:
        return (PROGRAM,) if asked in (AUTO, PROGRAM) else ()
    return (PROGRAM, HYBRID) if asked == AUTO and device != "cpu" else (asked,)


def _beside(
    question: Question, plain: Plan, source: AllowedDraft, device: str, loop: str, wish: DraftWish, *, fixed: bool
) -> Plan:
    """The target's plan for that loop with the draft on that device, and what both promise together.

    DoesNotFitError where there is no room for both, StrataError where it cannot be.
    """
    assert isinstance(question.place, Here), "checked before"
    context = min(plain.settings.context_tokens, DRAFT_CONTEXT_TOKENS)
    draft_s, ram, gpu = _draft_costs(question, plain, source, device, loop, context)
    if fixed:
        room, target = left_over(plain), plain
        if ram > room.ram_bytes or gpu > room.gpu_bytes:
            raise DoesNotFitError(
                f"{source.name} needs {format_size(ram)} of RAM and {format_size(gpu)} of GPU memory; the plan leaves "
                f"{format_size(room.ram_bytes)} and {format_size(room.gpu_bytes)}",
                needed_bytes=ram + gpu,
                available_bytes=room.ram_bytes + room.gpu_bytes,
            )
    else:
        asked = replace(question, wish=replace(question.wish, loop=loop), budget=_less(question.budget, ram, gpu))
        target = plan_executed(asked, question.place)
    acceptance, said = _acceptance(question, source, wish)
    plain_s = 1 / target.predicted.decode_tokens_per_s
    ratios = pass_ratios(replace(question, budget=target.budget), target, wish.most + 1)
    apart = device != "cpu" == target.settings.device
    depth, rate = best_turn(acceptance, draft_s, lambda tokens: plain_s * ratios[tokens - 1], wish.most, apart=apart)
    draft = PlannedDraft(
        kind=DraftKind.HEAD if source.model is None else DraftKind.MODEL,
        name=source.name,
        path=source.path,
        looks_up=wish.looks_up,
        device=device,
        depth=depth,
        acceptance=acceptance,
        acceptance_source=said,
        draft_s=draft_s,
        context_tokens=context,
        ram_bytes=ram,
        gpu_bytes=gpu,
        plain_tokens_per_s=plain.predicted.decode_tokens_per_s,
        tokens_per_s=rate,
    )
    return replace(target, draft=draft)


def _draft_costs(
    question: Question, plain: Plan, source: AllowedDraft, device: str, loop: str, context: int
) -> tuple[float, int, int]:
    """Seconds of a drafted token, and bytes of RAM and of the GPU's memory beside a target of that loop."""
    assert isinstance(question.place, Here), "checked before"
    if source.model is None:
        cpu = cpu_here(question.place.profile)
        threads = plain.settings.threads
        outputs = (unit for unit in question.shape.units if unit.kind is UnitKind.OUTPUT)
        reading = sum(
            unit_cost.cpu_seconds(cpu, threads, unit_cost.bytes_by_type(unit, 1.0), unit_cost.dense(1), 1)
            for unit in outputs
        )
        matrices = source.head_bytes - 2 * question.shape.vocab_size * question.shape.embedding_length
        return reading + matrices / question.place.profile.read_rate(threads), 2 * source.head_bytes, 0
    on_gpu = device != "cpu"
    budget = _without_margins(question.budget)
    plan = _draft_plan(source, question.place, budget, context, plain.settings.threads, on_gpu=on_gpu)
    ram, gpu = _shared(replace(plain, settings=replace(plain.settings, loop=loop)), device)
    needs = plan.needs
    return (
        1 / plan.predicted.decode_tokens_per_s,
        max(needs.ram.peak_bytes - ram, 0),
        max(needs.gpu.peak_bytes - gpu, 0),
    )


def _draft_plan(source: AllowedDraft, place: Here, budget: Budget, context: int, threads: int, *, on_gpu: bool) -> Plan:
    """A small plan for the draft alone; DoesNotFitError where it finds no room."""
    assert source.model is not None, "a head runs by no plan"
    assert source.shape is not None, "a model has a shape"
    here = place if on_gpu else replace(place, gpu=None)
    context = min(context, source.shape.context_length)
    wish = Wish(context, threads, loop=HYBRID if on_gpu else PROGRAM)
    return plan_executed(Question(source.model, source.shape, budget, wish, here), here)


def _shared(target: Plan, device: str) -> tuple[int, int]:
    """Bytes of RAM and GPU memory that a draft's plan counts for the process, and the target's has counted already."""
    if device == "cpu" or target.settings.loop != HYBRID:
        return PACKED_PROCESS_BYTES, 0
    if is_simulated(device):
        return PACKED_PROCESS_BYTES + TORCH_BYTES, 0
    return GPU_PROCESS_RAM_BYTES, GPU_PROCESS_BYTES


def _less(budget: Budget, ram_bytes: int, gpu_bytes: int) -> Budget:
    """`budget` with so much set aside."""
    return replace(
        budget,
        ram_bytes=max(budget.ram_bytes - ram_bytes, 0),
        gpu_bytes=max(budget.gpu_bytes - gpu_bytes, 0),
        ram_source=f"{budget.ram_source}, less {format_size(ram_bytes)} for the draft",
        gpu_source=f"{budget.gpu_source}, less {format_size(gpu_bytes)} for the draft"
        if gpu_bytes
        else budget.gpu_source,
    )


def _without_margins(budget: Budget) -> Budget:
    """`budget` for a second model: the margins are the target's."""
    return replace(budget, ram_margin_bytes=0, gpu_margin_bytes=0)


def _acceptance(question: Question, source: AllowedDraft, wish: DraftWish) -> tuple[float, str]:
    """What is expected, and where from."""
    assert isinstance(question.place, Here), "checked before"
    if wish.acceptance is not None:
        return wish.acceptance, GIVEN
    learned = learned_acceptance(question.place.profile, question.model.key, source.key)
    if learned is None:
        return EXPECTED_ACCEPTANCE, ASSUMED
    return learned.rate, f"learned from {learned.runs} {'run' if learned.runs == 1 else 'runs'}"


def _tokens_per_s(plan: Plan) -> float:
    """What a plan with a draft promises."""
    assert plan.draft is not None, "it has one"
    return plan.draft.tokens_per_s


def _is_welcome(plan: Plan, draft: PlannedDraft, wish: DraftWish) -> bool:
    """Whether a draft is worth loading: it pays, or was named and costs the target nothing."""
    if draft.depth and draft.tokens_per_s > draft.plain_tokens_per_s:
        return True
    return wish.is_named and plan.predicted.decode_tokens_per_s >= DISPLACES * draft.plain_tokens_per_s


def _lookup(plain: Plan, wish: DraftWish) -> PlannedDraft:
    """Lookup alone: it costs nothing, and what it brings depends on the text."""
    return _modest(plain, DraftKind.LOOKUP, f"lookup ({LOOKUP_NAME})", wish.most, plain.predicted.decode_tokens_per_s)


def _declined(plain: Plan, wish: DraftWish, best: Plan | None) -> PlannedDraft:
    """That no source is loaded, with the figures of the best of them."""
    if best is None or best.draft is None:
        return _modest(plain, DraftKind.NONE, ", ".join(source.name for source in wish.sources), 0, 0.0)
    return replace(best.draft, kind=DraftKind.NONE, path=None, ram_bytes=0, gpu_bytes=0)


def _modest(plain: Plan, kind: DraftKind, name: str, depth: int, tokens_per_s: float) -> PlannedDraft:
    """A draft that takes nothing."""
    return PlannedDraft(
        kind=kind,
        name=name,
        path=None,
        looks_up=kind is DraftKind.LOOKUP,
        device="cpu",
        depth=depth,
        acceptance=EXPECTED_ACCEPTANCE,
        acceptance_source=ASSUMED,
        draft_s=0.0,
        context_tokens=plain.settings.context_tokens,
        ram_bytes=0,
        gpu_bytes=0,
        plain_tokens_per_s=plain.predicted.decode_tokens_per_s,
        tokens_per_s=tokens_per_s,
    )
