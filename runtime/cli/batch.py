"""`strata batch`: answers for a file of prompts, journalled line by line, resumed after any interruption."""

from pathlib import Path
from typing import Annotated

import typer

from runtime.cli.console import console, progress
from runtime.cli.groups import grouped
from runtime.cli.options import LaunchOptions, Quiet, SamplingOptions
from runtime.cli.signals import stop_at_token_boundary

DEFAULT_MAX_TOKENS = 256


@grouped
def command(
    *,
    launch: LaunchOptions,
    sampling: SamplingOptions,
    input_file: Annotated[Path, typer.Argument(help="JSONL: a prompt, messages or an OpenAI batch request a line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Answers, one JSON line each; also the journal.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where the output exists.")] = False,
    parallel: Annotated[int, typer.Option("-np", "--parallel", min=1, help="Answers computed together.")] = 8,
    max_tokens: Annotated[
        int, typer.Option("-n", "--predict", min=1, help="Most tokens of an answer whose line says nothing.")
    ] = DEFAULT_MAX_TOKENS,
    quiet: Quiet = False,
) -> None:
    """Answer a file of prompts; started again, it goes on where it was stopped."""
    from runtime.batch import run_batch  # noqa: PLC0415 - brings torch
    from runtime.batch_engine import EngineForBatch  # noqa: PLC0415
    from runtime.batch_requests import BatchDefaults  # noqa: PLC0415
    from runtime.cli.launch import running_engine  # noqa: PLC0415

    defaults = BatchDefaults(max_tokens, sampling.params(), tuple(sampling.stop))
    with (
        stop_at_token_boundary() as cancelled,
        running_engine(launch, quiet=quiet) as running,
        progress("answering", unit="lines") as report,
    ):
        summary = run_batch(
            EngineForBatch(running),
            input_file,
            output,
            defaults=defaults,
            model_id=running.model_id,
            parallel=parallel,
            overwrite=overwrite,
            cancelled=cancelled,
            progress=report,
        )
    console.print(summary.describe(), markup=False)
    if summary.remaining:
        raise typer.Exit(1)
