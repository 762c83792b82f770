"""Shows a plan to a person: a table by layer groups, bars of memory against budget, the prediction, and how it held.

Draws to a rich console that the caller gives; 80 columns are enough. Knows nothing about how plans are made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from offload.tiers import Device, Tier
from planner.budget import Budget, format_size
from planner.figures import count, duration, figures, plural
from planner.model_shape import UnitKind
from planner.plan import MemoryNeeds, Objective, Placement, Plan, WeightsForm
from planner.prediction import Measurement, Prediction

_TIER_NAMES = {Tier.GPU: "GPU", Tier.RAM: "RAM", Tier.FLASH: "flash"}
_KIND_NAMES = {
    UnitKind.DENSE_FFN: "FFN",
    UnitKind.SHARED_EXPERT: "shared expert",
    UnitKind.OTHER: "other",
}
_FORM_NAMES = {
    WeightsForm.FLOAT32: "float32",
    WeightsForm.QUANTISED: "as in the file, made float32 on use",
    WeightsForm.PACKED: "as in the file",
}
_BAR_WIDTH = 40
_INDENT = 6
_MOST_RUNS = 3  # of layers that a row names
_SEGMENTS = (
    ("weights", "cyan"),
    ("slots", "green"),
    ("KV cache", "magenta"),
    ("working space", "yellow"),
    ("program", "blue"),
    ("margin", "bright_black"),
)


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table: the parts that lie together in layers that are alike."""

    layers: str
    kinds: tuple[UnitKind, ...]
    tier: Tier
    device: Device
    num_bytes: int


def render_plan(console: Console, plan: Plan) -> None:
    """Print what runs where, what memory it takes, how fast it should be, and what to know about it."""
    model, settings = plan.model, plan.settings
    size = f"{count(model.num_parameters)} parameters"
    if model.expert_count:
        size += f", {count(model.active_parameters)} active"
    console.print(Text(f"{model.architecture} · {size} · {format_size(model.byte_size)} file", style="bold"))
    if not plan.machine.here:
        console.print(Text(f"on {plan.machine.name}, as described", style="dim"))
    elif plan.machine.gpu is not None:
        console.print(Text(f"with {plan.machine.gpu}", style="dim"))
    console.print(_placement_table(plan))
    for tier, needs, available in (
        (Tier.GPU, plan.needs.gpu, plan.budget.gpu_bytes),
        (Tier.RAM, plan.needs.ram, plan.budget.ram_bytes),
    ):
        if needs.needed_bytes:
            _print_bar(console, tier, needs, available, plan.budget)
    form = _FORM_NAMES[settings.weights_form]
    kv = "" if settings.kv.is_plain else f" · KV {settings.kv.name}"
    console.print(f"weights {form} · context {settings.context_tokens} tokens{kv} · {_computed_by(plan)}")
    console.print(_prediction_line(plan.predicted, simulated=plan.is_simulated))
    for number, line in enumerate(plan.draft.lines() if plan.draft is not None else ()):
        console.print(Text("       " if number else "draft: ", style="bold").append(line, style="not bold"))
    for note in plan.notes:
        console.print(f"[yellow]note[/] {escape(note)}")


def render_comparison(
    console: Console, predicted: Prediction, measured: Measurement, budget: Budget | None = None
) -> None:
    """Print what was predicted beside what a run measured, the ratio of the two, and the peak against the budget."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in ("predicted", "measured", "measured / predicted"):
        table.add_column(name, justify="right")
    speeds: list[tuple[str, float, float | None]] = [
        ("decode", predicted.decode_tokens_per_s, measured.decode_tokens_per_s)
    ]
    if measured.prompt_tokens in (None, predicted.prompt_tokens):
        speeds.append(("prefill", predicted.prefill_tokens_per_s, measured.prefill_tokens_per_s))
    for name, promise, fact in speeds:
        shown = "-" if fact is None else f"{figures(fact)} tokens/s"
        table.add_row(name, f"{figures(promise)} tokens/s", shown, _ratio(fact, promise))
    if measured.prompt_tokens in (None, predicted.prompt_tokens):
        shown = "-" if measured.ttft_s is None else duration(measured.ttft_s)
        table.add_row("first token", duration(predicted.ttft_s), shown, _ratio(measured.ttft_s, predicted.ttft_s))
    if predicted.hit_rate is not None:
        shown = "-" if measured.hit_rate is None else f"{measured.hit_rate:.0%}"
        ratio = "-" if measured.hit_rate is None else _ratio(measured.hit_rate, predicted.hit_rate)
        where = "on the GPU" if predicted.peak_gpu_bytes else "in RAM"
        table.add_row(f"experts found {where}", f"{predicted.hit_rate:.0%}", shown, ratio)
    promise, fact = predicted.peak_ram_bytes, measured.peak_ram_bytes
    table.add_row("peak RAM", format_size(int(promise)), format_size(fact), _ratio(fact, promise))
    if predicted.peak_gpu_bytes and measured.peak_gpu_bytes is not None:
        promise, fact = predicted.peak_gpu_bytes, measured.peak_gpu_bytes
        table.add_row("peak GPU", format_size(promise), format_size(fact), _ratio(fact, promise))
    console.print(table)
    if budget is not None:
        console.print(_budget_line(measured.peak_ram_bytes, budget))


def _budget_line(peak_bytes: int, budget: Budget) -> Text:
    """The most RAM that was held, against what may be used with the margin left free."""
    allowed = max(budget.ram_bytes - budget.ram_margin_bytes, 1)
    line = Text(f"peak RAM is {peak_bytes / allowed:.0%} of the {format_size(allowed)} that may be used", style="dim")
    if peak_bytes > allowed:
        line.append(f": {format_size(peak_bytes - allowed)} too much; plan with less context (-c)", style="yellow")
    return line


def _computed_by(plan: Plan) -> str:
    """What computes, and what the plan is made quick at where that is not the next token."""
    settings = plan.settings
    parts = [] if settings.device == "cpu" else [_device_name(plan)]
    if any(placement.device is Device.CPU for placement in plan.placements):
        parts.append(f"{settings.threads} {plural(settings.threads, 'thread')}")
    aim = {Objective.THROUGHPUT: " · for throughput", Objective.TTFT: " · for an early first token"}
    return " and ".join(parts) + aim.get(plan.objective, "")


def _device_name(plan: Plan) -> str:
    device = plan.settings.device
    return "simulated GPU" if plan.is_simulated else "GPU" if device == "gpu" else device


def _placement_table(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layers", no_wrap=True)
    table.add_column("parts", ratio=1)
    for name in ("in", "on"):
        table.add_column(name, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for row in _rows(plan.placements):
        parts = ", ".join(_part_name(plan, kind) for kind in row.kinds)
        table.add_row(row.layers, parts, _TIER_NAMES[row.tier], row.device.value.upper(), format_size(row.num_bytes))
    if (slots := plan.settings.gpu_slots) and plan.needs.gpu.slots_bytes:
        size = format_size(plan.needs.gpu.slots_bytes)
        table.add_row("", f"slots for {slots} experts of them", _TIER_NAMES[Tier.GPU], "GPU", size)
    return table


def _rows(placements: Sequence[Placement]) -> Iterator[_Row]:
    """Layers that have the same parts in the same places, one row for each place; in the order of the first of them."""
    alike: dict[tuple[object, ...], list[tuple[int | None, list[Placement]]]] = {}
    for layer, group in groupby(placements, key=lambda placement: placement.layer):
        units = list(group)
        places = tuple((unit.kind, unit.tier, unit.device) for unit in units)
        alike.setdefault((layer is None and units[0].kind, *places), []).append((layer, units))
    for entries in alike.values():
        layers = _layers([layer for layer, _ in entries if layer is not None])
        units = [unit for _, group in entries for unit in group]
        for tier, device in dict.fromkeys((unit.tier, unit.device) for unit in units):
            here = [unit for unit in units if (unit.tier, unit.device) == (tier, device)]
            yield _Row(
                layers=layers,
                kinds=tuple(dict.fromkeys(unit.kind for unit in here)),
                tier=tier,
                device=device,
                num_bytes=sum(unit.num_bytes for unit in here),
            )


def _layers(numbers: Sequence[int]) -> str:
    """Numbers of layers in runs: "0-3,7"; where those are many, how many there are between which."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    if len(runs) > _MOST_RUNS:
        return f"{len(numbers)} of {numbers[0]}-{numbers[-1]}"
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _part_name(plan: Plan, kind: UnitKind) -> str:
    model = plan.model
    if kind is UnitKind.EXPERTS:
        return f"experts ({model.expert_count}, {model.expert_used_count} used)"
    if kind is UnitKind.KV:
        return "KV cache"
    if kind is UnitKind.OUTPUT and model.tied_output:
        return "output (shares the embedding)"
    return _KIND_NAMES.get(kind, kind.value)


def _print_bar(console: Console, tier: Tier, needs: MemoryNeeds, available_bytes: int, budget: Budget) -> None:
    """One memory as a bar of its budget's length, with a legend of what fills it."""
    amounts = (
        needs.weights_bytes,
        needs.slots_bytes,
        needs.kv_bytes,
        needs.activations_bytes + needs.buffers_bytes,
        needs.vocabulary_bytes + needs.process_bytes,
        needs.margin_bytes,
    )
    bar = Text()
    legend: list[Text] = []
    filled = total = 0
    for (name, color), num_bytes in zip(_SEGMENTS, amounts, strict=True):
        total += num_bytes
        end = min(_BAR_WIDTH, round(_BAR_WIDTH * total / max(available_bytes, 1)))
        bar.append("█" * (end - filled), style=color)
        filled = end
        if num_bytes:
            legend.append(Text("■ ", style=color).append(f"{name} {format_size(num_bytes)}", style="dim"))
    bar.append("░" * (_BAR_WIDTH - filled), style="bright_black")
    source = budget.ram_source if tier is Tier.RAM else budget.gpu_source
    line = Text(f"{_TIER_NAMES[tier]:<{_INDENT}}").append_text(bar)
    line.append(f" {format_size(needs.needed_bytes)} of {format_size(available_bytes)}")
    console.print(line, no_wrap=True, overflow="ellipsis")
    _print_items(console, [*legend, Text(f"({source})", style="dim")])


def _print_items(console: Console, items: Sequence[Text]) -> None:
    """Items side by side, none of them broken at the end of a line."""
    line = Text(" " * _INDENT)
    for item in items:
        if len(line) > _INDENT and line.cell_len + item.cell_len > console.width:
            console.print(line)
            line = Text(" " * _INDENT)
        line.append_text(item).append("  ")
    console.print(line)


def _prediction_line(predicted: Prediction, *, simulated: bool) -> Text:
    line = Text("predicted, on a simulated GPU, " if simulated else "predicted ")
    line.append(f"{figures(predicted.decode_tokens_per_s)} tokens/s", style="bold green")
    line.append(f", bound by {predicted.bottleneck.value}")
    correction = predicted.decode_correction
    if correction.runs:
        runs = f"{correction.runs} earlier {plural(correction.runs, 'run')}"
        line.append(f" (corrected by {correction.factor:.2g}x from {runs})")
    return line.append(
        f"\n          first token of a prompt of {predicted.prompt_tokens} after {duration(predicted.ttft_s)}"
    )


def _ratio(fact: float | None, promise: float) -> str:
    return "-" if fact is None or promise <= 0 else f"{fact / promise:.2f}"
