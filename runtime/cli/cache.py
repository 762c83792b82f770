"""`strata cache simulate`: what caches of experts would have hit on a recorded routing trace, by policy and size.

A trace is recorded with `strata run --record-routing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from offload.errors import RequestError
from offload.gguf import GGUFFile
from offload.policies import PolicyName
from offload.routing_trace import RoutingTrace, model_name
from offload.trace_replay import ReplayResult, belady, replay
from planner.budget import format_size, parse_size
from planner.model_shape import ModelShape
from planner.plot_hits import plot_hits
from planner.streamed import slot_bytes, streamed_units
from runtime.cli.console import console, progress, write_json
from runtime.cli.options import AsJson, model_path

BOUND = "belady"
DEFAULT_SIXTEENTHS = (1, 2, 4, 6, 8, 10, 12, 14)  # of all experts

app = typer.Typer(no_args_is_help=True, help="Look at how caches of experts do; `cache simulate`: on a recorded trace.")


class PolicyChoice(StrEnum):
    """Policies to replay."""

    ALL = "all"
    LRU = PolicyName.LRU.value
    LFU = PolicyName.LFU.value
    SCORE = PolicyName.SCORE.value
    LEAST_STALE = PolicyName.LEAST_STALE.value


@dataclass(frozen=True, slots=True)
class _Size:
    """A cache of one size: what each policy does, and the most that any could."""

    slots: int
    by_policy: dict[PolicyName, ReplayResult]
    bound: ReplayResult

    @property
    def best(self) -> PolicyName:
        """The policy with the most hits."""
        return max(self.by_policy, key=lambda name: self.by_policy[name].hits)


@app.callback()
def cache() -> None:
    """Look at how caches of experts do."""


@app.command()
def simulate(
    *,
    trace_file: Annotated[Path, typer.Argument(metavar="TRACE", help="A routing trace, as recorded (.npz).")],
    slots: Annotated[str | None, typer.Option("--slots", help="Sizes in experts, e.g. 64,128,256.")] = None,
    ram: Annotated[str | None, typer.Option("--ram", help="Sizes in bytes, e.g. 1GiB,2GiB; needs -m.")] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="The model, to know its experts' sizes.")] = None,
    policy: Annotated[PolicyChoice, typer.Option("--policy", help="What to replay.")] = PolicyChoice.ALL,
    tokens_per_step: Annotated[
        int, typer.Option("--tokens-per-step", min=1, help="Tokens that are computed together.")
    ] = 1,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Tokens at the start that do not count.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the curves to this file (the extra `plot`).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a routing trace over policies and sizes of cache, with Belady's optimum as the bound."""
    trace = RoutingTrace.load(trace_file)
    if warm_up >= trace.tokens:
        raise RequestError(f"the trace has {trace.tokens} tokens, of which {warm_up} shall not count")
    ram_a_slot = _ram_a_slot(trace, model) if model is not None else None
    numbers = _slot_numbers(trace, slots, ram, ram_a_slot)
    names = list(PolicyName) if policy is PolicyChoice.ALL else [PolicyName(policy.value)]
    sizes = _replayed(trace, numbers, names, tokens_per_step, warm_up)
    if plot is not None:
        title = f"{trace.model}: {trace.tokens - warm_up} tokens, {trace.layers} layers of {trace.experts} experts"
        plot_hits(_curves(sizes, names), BOUND, title, plot)
        console.print(f"drawn to {plot}", markup=False)
    if as_json:
        write_json(_document(trace, sizes, ram_a_slot, tokens_per_step, warm_up))
    else:
        _show(Console(highlight=False), trace, sizes, ram_a_slot, warm_up)


def _ram_a_slot(trace: RoutingTrace, model: str) -> int:
    """RAM that an expert of the model takes, which must be the trace's."""
    with GGUFFile.open(model_path(model)) as gguf:
        shape = ModelShape.from_gguf(gguf)
        trace.check_model(model_name(gguf), len(streamed_units(shape)), shape.expert_count)
    return slot_bytes(shape)


def _slot_numbers(trace: RoutingTrace, slots: str | None, ram: str | None, ram_a_slot: int | None) -> list[int]:
    """The sizes asked for in experts, rising; without any, parts of the model."""
    total = trace.layers * trace.experts
    if slots is not None and ram is not None:
        raise RequestError("--slots and --ram both say how large the cache is", hint="give one of them")
    if ram is not None:
        if ram_a_slot is None:
            raise RequestError("--ram needs to know how large an expert is", hint="name the model: -m FILE")
        numbers = [parse_size(size) // ram_a_slot for size in ram.split(",")]
    elif slots is not None:
        try:
            numbers = [int(number) for number in slots.split(",")]
        except ValueError as error:
            raise RequestError(f"--slots {slots!r} is not understood", hint="write it as --slots 64,128,256") from error
    else:
        numbers = [total * part // 16 for part in DEFAULT_SIXTEENTHS]
    if min(numbers) < 0:
        raise RequestError("a cache cannot have fewer than 0 slots")
    return sorted({min(number, total) for number in numbers})


def _replayed(
    trace: RoutingTrace, numbers: Sequence[int], names: Sequence[PolicyName], tokens_per_step: int, warm_up: int
) -> list[_Size]:
    sizes = []
    with progress("replaying", unit="runs") as report:
        for done, slots in enumerate(numbers):
            report(done, len(numbers))
            results = {
                name: replay(trace, slots, name, tokens_per_step=tokens_per_step, warm_up_tokens=warm_up)
                for name in names
            }
            bound = belady(trace, slots, tokens_per_step=tokens_per_step, warm_up_tokens=warm_up)
            sizes.append(_Size(slots, results, bound))
    return sizes


def _best(sizes: Sequence[_Size]) -> PolicyName:
    """The policy with the most hits over all sizes."""
    return max(sizes[0].by_policy, key=lambda name: sum(size.by_policy[name].hits for size in sizes))


def _curves(sizes: Sequence[_Size], names: Sequence[PolicyName]) -> dict[str, list[tuple[int, float]]]:
    curves = {name.value: [(size.slots, size.by_policy[name].hit_rate) for size in sizes] for name in names}
    return {**curves, BOUND: [(size.slots, size.bound.hit_rate) for size in sizes]}


def _show(out: Console, trace: RoutingTrace, sizes: Sequence[_Size], ram_a_slot: int | None, warm_up: int) -> None:
    """A row for each size, then the policy that does best."""
    names = list(sizes[0].by_policy)
    counted = f"{trace.tokens - warm_up} of {trace.tokens}" if warm_up else f"{trace.tokens}"
    out.print(
        f"{trace.model}: {counted} tokens, {trace.layers} layers of {trace.experts} experts, {trace.used} used; "
        "hits of all lookups",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("slots", "of all", *(["RAM"] if ram_a_slot else []), *names, BOUND, "misses/\ntoken"):
        table.add_column(title, justify="right")
    table.add_column("best")
    for size in sizes:
        table.add_row(
            str(size.slots),
            f"{size.slots / (trace.layers * trace.experts):.0%}",
            *([format_size(size.slots * ram_a_slot)] if ram_a_slot else []),
            *(f"{size.by_policy[name].hit_rate:.1%}" for name in names),
            f"{size.bound.hit_rate:.1%}",
            f"{size.by_policy[size.best].misses_per_token:.1f}",
            size.best.value,
        )
    out.print(table)
    if len(names) > 1:
        out.print(f"best over these sizes: {_best(sizes)}")


def _document(
    trace: RoutingTrace, sizes: Sequence[_Size], ram_a_slot: int | None, tokens_per_step: int, warm_up: int
) -> dict[str, Any]:
    return {
        "model": trace.model,
        "tokens": trace.tokens,
        "layers": trace.layers,
        "experts": trace.experts,
        "used": trace.used,
        "tokens_per_step": tokens_per_step,
        "warm_up_tokens": warm_up,
        "slot_bytes": ram_a_slot,
        "best": _best(sizes).value,
        "sizes": [
            {
                "slots": size.slots,
                "best": size.best.value,
                "policies": {name.value: _figures(result) for name, result in size.by_policy.items()},
                "bound": _figures(size.bound),
            }
            for size in sizes
        ],
    }


def _figures(result: ReplayResult) -> dict[str, float]:
    return {
        "hits": result.hits,
        "lookups": result.lookups,
        "hit_rate": result.hit_rate,
        "misses_per_token": result.misses_per_token,
    }
