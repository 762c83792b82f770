"""`strata bench`: prompt and generation speed, with llama-bench's options, columns and output forms."""

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cpu_kernels.quant_types import QUANT_TYPES, quant_type
from offload.errors import RequestError
from planner.budget import format_size
from planner.profile import stored as stored_profile
from runtime.cli.console import progress, write_json, write_text
from runtime.cli.draft_options import DraftingOptions, tell_drafts
from runtime.cli.groups import grouped
from runtime.cli.options import AsJson, EngineChoice, LaunchOptions, Model, TraceFile
from runtime.trace import Trace

MOST_DIGITS = 9
KERNEL_TYPES = ("Q8_0", "Q6_K", "Q4_K", "Q4_0", "IQ4_XS", "Q2_K", "TQ2_0", "F16")


class Peer(StrEnum):
    """Runtimes to be measured against."""

    LLAMA_CPP = EngineChoice.LLAMA_CPP.value


class Output(StrEnum):
    """Forms of the table."""

    MD = "md"
    CSV = "csv"
    JSON = "json"
    JSONL = "jsonl"


app = typer.Typer(
    invoke_without_command=True, help="Measure how fast a model runs here; `bench kernels`: its products."
)


@dataclass(frozen=True, slots=True)
class BenchOptions(LaunchOptions):
    """The same as for other commands; without -m the built-in model."""

    model: Model = "demo"


@app.callback()
@grouped
def model(
    *,
    invocation: typer.Context,
    launch: BenchOptions,
    drafting: DraftingOptions,
    prompt: Annotated[list[str], typer.Option("-p", "--n-prompt", help="Prompt lengths: 128,512; 0 skips.")] = ["128"],  # noqa: B006
    generate: Annotated[list[str], typer.Option("-n", "--n-gen", help="Answer lengths: 32,64; 0 skips.")] = ["64"],  # noqa: B006
    depth: Annotated[list[str], typer.Option("-d", "--n-depth", help="Tokens of context before: 0,4096.")] = ["0"],  # noqa: B006
    threads: Annotated[list[str], typer.Option("-t", "--threads", help="CPU threads: 1,2.")] = [],  # noqa: B006
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Runs of each test.")] = 5,
    peer: Annotated[
        Peer | None, typer.Option("--peer", help="Measure it in turn on the same file (the extra `peer`).")
    ] = None,
    output: Annotated[Output, typer.Option("-o", "--output", help="Form of the table.")] = Output.MD,
    trace_file: TraceFile = None,
) -> None:
    """Measure how fast a model runs here: a row for every combination of the lists."""
    if invocation.invoked_subcommand:
        return
    from runtime.bench import BenchTest, as_row, draft_columns, measure, measure_drafted, stream_columns  # noqa: PLC0415
    from runtime.cli.launch import running_engine  # noqa: PLC0415

    depths = numbers("-d", depth)
    tests = [BenchTest(tokens, 0, before) for before in depths for tokens in numbers("-p", prompt) if tokens]
    tests += [BenchTest(0, tokens, before) for before in depths for tokens in numbers("-n", generate) if tokens]
    if not tests:
        raise RequestError("nothing to measure: every length is 0")
    if threads and launch.plan_file is not None:
        raise RequestError("-t does not go with --plan: the plan says how many threads", hint="give one of them")
    launch = replace(launch, context=launch.context or max(test.rows for test in tests))
    counts: list[int | None] = [*numbers("-t", threads, least=1)]
    rows = []
    trace = None if trace_file is None else Trace(trace_file)
    for count in counts or [None]:
        ours = replace(launch, threads=count)
        with ExitStack() as stack:
            draft = drafting.choice()
            engines = [stack.enter_context(running_engine(ours, quiet=True, draft=draft))]
            if peer is not None:
                other = replace(ours, engine=EngineChoice(peer.value))
                engines.append(stack.enter_context(running_engine(other, quiet=True)))
            if trace is not None:
                engines[0].trace(trace)
            for test in tests:
                with progress(test.name, unit="runs") as report:
                    before = engines[0].cache_counts
                    results = measure(engines, test, repetitions=repetitions, on_repetition=report, trace=trace)
                row = as_row(engines[0], *results) | stream_columns(engines[0], before)
                rows.append(row | draft_columns(engines[0], drafted=False) if draft.is_on else row)
                if not draft.is_on or not test.generated_tokens:
                    continue
                with progress(f"{test.name} with drafts", unit="runs") as report:
                    result = measure_drafted(engines[0], test, repetitions=repetitions, on_repetition=report)
                rows.append({**row, **as_row(engines[0], result), **draft_columns(engines[0], drafted=True)})
                tell_drafts(engines[0], quiet=not drafting.stats, stats=drafting.stats)
    if trace is not None:
        trace.write()
    write_rows(rows, output)


@app.command()
def kernels(
    *,
    types: Annotated[list[str], typer.Option("--type", help="Quant types; may be repeated.")] = list(KERNEL_TYPES),  # noqa: B006
    columns: Annotated[list[int], typer.Option("--columns", min=1, help="Tokens multiplied at once.")] = [1, 4, 8, 128],  # noqa: B006
    threads: Annotated[int, typer.Option("-t", "--threads", min=1, help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="About how long to measure.")] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Products of one matrix by quant type: time, and share of read bandwidth and of the dot products' peak.

    A star marks the kernels that models are run with, once they were chosen on this machine.
    """
    from cpu_kernels.measure import kernel_table  # noqa: PLC0415 - brings llvmlite and numba

    unknown = [name for name in types if name not in {kind.name for kind in QUANT_TYPES.values()}]
    if unknown:
        raise RequestError(f"there is no quant type {unknown[0]}", hint="types are called as GGUF calls them: Q4_K")
    with progress("measuring", unit="runs"):
        figures = kernel_table([quant_type(name) for name in types], columns, threads=threads, seconds_budget=seconds)
    profile = stored_profile()
    choices = profile.tuning.choices if profile is not None and profile.tuning is not None else {}
    chosen = [figure.quant_type in choices and choices[figure.quant_type].family is figure.family for figure in figures]
    if as_json:
        write_json([{**asdict(figure), "chosen": mark} for figure, mark in zip(figures, chosen, strict=True)])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("type", "kernel", "tokens", "us", "GB/s", "of read", "Gmac/s", "of peak"):
        table.add_column(title, justify="left" if title in ("type", "kernel") else "right")
    for figure, mark in zip(figures, chosen, strict=True):
        table.add_row(
            figure.quant_type,
            f"{figure.family} *" if mark else figure.family,
            str(figure.columns),
            f"{1e6 * figure.seconds:.0f}",
            f"{figure.gb_per_s:.1f}",
            f"{figure.share_of_read:.0%}",
            f"{figure.gmac_per_s:.0f}",
            f"{figure.share_of_peak:.0%}",
        )
    Console(highlight=False).print(table)


def numbers(option: str, texts: Sequence[str], least: int = 0) -> list[int]:
    """The numbers of an option given as `-p 128,512 -p 1024`; RequestError for what is no list of such numbers."""
    found = [part.strip() for text in texts for part in text.split(",")]
    for part in found:
        if not (part.isascii() and part.isdigit() and len(part) <= MOST_DIGITS and int(part) >= least):
            raise RequestError(
                f"{option} has {part!r}: not a whole number from {least} on", hint=f"write lists as {option} 128,512"
            )
    return [int(part) for part in found]


def write_rows(rows: Sequence[dict[str, Any]], output: Output) -> None:
    """Put the table on stdout."""
    if output is Output.JSON:
        write_json(list(rows))
    elif output is Output.JSONL:
        write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif output is Output.CSV:
        plain = [{key: value for key, value in row.items() if not key.endswith("samples_ts")} for row in rows]
        writer = csv.DictWriter(sys.stdout, plain[0].keys())
        writer.writeheader()
        writer.writerows(plain)
    else:
        write_text(_markdown(rows))


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    """llama-bench's table, with two columns more where a peer was measured."""
    against, with_drafts = "ratio" in rows[0], "draft" in rows[0]
    titles = [
        "model",
        "size",
        "params",
        "backend",
        "threads",
        "test",
        "t/s",
        *(["peer t/s", "ratio"] if against else []),
        *(["draft", "accepted", "tokens/pass"] if with_drafts else []),
    ]
    lines = [" | ".join(titles), " | ".join("---" if title in ("model", "backend") else "---:" for title in titles)]
    for row in rows:
        cells = [
            row["model_type"],
            format_size(row["model_size"]),
            f"{row['model_n_params'] / 1e6:.2f} M",
            row["backend"],
            str(row["n_threads"]),
            row["test"],
            f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
        ]
        if against:
            cells += [f"{row['peer_avg_ts']:.2f}", f"{row['ratio']:.2f}"]
        if with_drafts:
            rate, tokens = row["acceptance_rate"], row["tokens_per_pass"]
            cells += [row["draft"] or "", f"{rate:.0%}" if rate is not None else "", f"{tokens:.2f}" if tokens else ""]
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)
