"""Shows a person the choices around a plan: what would change it, why a unit lies where it does, files side by side.

Draws to a rich console that the caller gives. Knows nothing about how any of it is found.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from planner.budget import format_size
from planner.compare import Ranked
from planner.figures import duration, figures
from planner.kv_costs import KVCost
from planner.plan import Plan
from planner.what_if import Alternative
from planner.why import Choice


def best_line(plan: Plan, help_: Alternative) -> str:
    """The one change that would help most, as in "2.0 GiB more RAM: 3.1 -> 5.4 tokens/s"."""
    now, then = plan.predicted.decode_tokens_per_s, help_.decode_tokens_per_s or 0.0
    return f"{help_.change}: {figures(now)} -> {figures(then)} tokens/s"


def render_what_if(console: Console, plan: Plan, alternatives: Sequence[Alternative]) -> None:
    """A line for each alternative, against the plan as it is."""
    table = _table("what if", "tokens/s", "against now", "first token", "peak RAM")
    predicted = plan.predicted
    now = predicted.decode_tokens_per_s
    table.add_row("as planned", figures(now), "", duration(predicted.ttft_s), format_size(predicted.peak_ram_bytes))
    for one in alternatives:
        if one.decode_tokens_per_s is None or one.ttft_s is None or one.peak_ram_bytes is None:
            table.add_row(one.change, "does not fit", "", "", "")
            continue
        speed = one.decode_tokens_per_s
        change = "same" if abs(speed / now - 1) < 0.005 else f"{speed / now:.2f}x"
        table.add_row(one.change, figures(speed), change, duration(one.ttft_s), format_size(one.peak_ram_bytes))
    console.print(table)


def render_kv_costs(console: Console, costs: Sequence[KVCost]) -> None:
    """A line for each context in each type: bytes, those on flash, and tokens a second with the context full.

    The last of them with a budget for reading.
    """
    budget = next((str(cost.budget_tokens) for cost in costs), "")
    table = _table("full context", "KV", "size", "on flash", "tokens/s", f"--kv-budget {budget}")
    for cost in costs:
        now, chosen = cost.decode_tokens_per_s, cost.budget_tokens_per_s
        table.add_row(
            str(cost.context_tokens),
            cost.kind,
            format_size(cost.num_bytes),
            format_size(cost.flash_bytes) if cost.flash_bytes else "-",
            "does not fit" if now is None else figures(now),
            "-" if chosen is None else figures(chosen),
        )
    console.print(table)


def render_why(console: Console, choices: Sequence[Choice]) -> None:
    """A line for each option of each unit: times of one token's step, bytes held, and what speaks against it."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("unit", "in", "on"):
        table.add_column(name, no_wrap=True)
    for name in ("computes", "loads", "RAM", "GPU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for one in choices:
        style = "bold" if one.taken else ""
        table.add_row(
            one.unit,
            one.tier.value,
            one.device.value,
            duration(one.compute_s),
            duration(one.load_s) if one.load_s else "-",
            format_size(one.ram_bytes) if one.ram_bytes else "-",
            format_size(one.gpu_bytes) if one.gpu_bytes else "-",
            escape(one.reason),
            style=style,
        )
    console.print(table)


def render_ranking(console: Console, files: Sequence[Ranked]) -> None:
    """A line for each file, fastest first, and below the reasons why some do not fit."""
    table = _table("file", "tokens/s", "first token", "size", "bits a weight", "peak RAM")
    for file in files:
        speeds = ("does not fit", "", format_size(file.byte_size), f"{file.bits_per_weight:.2f}", "")
        if file.plan is not None:
            predicted = file.plan.predicted
            speeds = (
                figures(predicted.decode_tokens_per_s),
                duration(predicted.ttft_s),
                format_size(file.byte_size),
                f"{file.bits_per_weight:.2f}",
                format_size(predicted.peak_ram_bytes),
            )
        table.add_row(escape(Path(file.path).name), *speeds)
    console.print(table)
    for file in files:
        if file.refusal is not None:
            console.print(file.refusal, style="dim", markup=False)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
