"""`strata batch`: answers for a file of prompts, journalled line by line, resumed after any interruption."""

from pathlib import Path
from typing import Annotated

import typer

from planner.figures import figures
from planner.parallel import parallel_here
from planner.ways import DEFAULT_PROMPT_TOKENS
from runtime.cli.console import console, progress
from runtime.cli.draft_options import DraftingOptions, tell_drafts
from runtime.cli.groups import grouped
from runtime.cli.options import LaunchOptions, Quiet, SamplingOptions
from runtime.cli.session_options import PrefixLimit, use_prefixes
from runtime.cli.signals import stop_at_token_boundary
from runtime.session_prefix import DEFAULT_LIMIT, Worth

DEFAULT_MAX_TOKENS = 256


@grouped
def command(
    *,
    launch: LaunchOptions,
    sampling: SamplingOptions,
    drafting: DraftingOptions,
    input_file: Annotated[Path, typer.Argument(help="JSONL: a prompt, messages or an OpenAI batch request a line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Answers, one JSON line each; also the journal.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where the output exists.")] = False,
    parallel: Annotated[
        int | None, typer.Option("-np", "--parallel", min=1, help="Answers computed together; without it, as planned.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--predict", min=1, help="Most tokens of an answer whose line says nothing.")
    ] = DEFAULT_MAX_TOKENS,
    prefix_cache: PrefixLimit = DEFAULT_LIMIT,
    quiet: Quiet = False,
) -> None:
    """Answer a file of prompts; started again, it goes on where it was stopped."""
    from runtime.batch import check_paths, run_batch  # noqa: PLC0415 - brings torch
    from runtime.batch_engine import EngineForBatch  # noqa: PLC0415
    from runtime.batch_requests import BatchDefaults  # noqa: PLC0415
    from runtime.cli.launch import opened, running  # noqa: PLC0415

    defaults = BatchDefaults(max_tokens, sampling.params(), tuple(sampling.stop))
    check_paths(input_file, output)  # before a model is loaded for nothing
    with (
        stop_at_token_boundary() as cancelled,
        opened(launch) as (gguf, text),
        running(launch, gguf, text, quiet=quiet, draft=drafting.choice()) as engine,
        progress("answering", unit="lines") as report,
    ):
        use_prefixes(engine, prefix_cache, Worth.SHARED)
        summary = run_batch(
            EngineForBatch(engine),
            input_file,
            output,
            defaults=defaults,
            model_id=engine.model_id,
            parallel=parallel or parallel_here(engine.plan, gguf, DEFAULT_PROMPT_TOKENS + max_tokens),
            overwrite=overwrite,
            cancelled=cancelled,
            progress=report,
        )
        tell_drafts(engine, quiet=quiet, stats=drafting.stats)
        shared = engine.shared_tokens
    console.print(summary.describe(), markup=False)
    if summary.answer_tokens and not quiet:
        speed = figures(summary.answer_tokens / summary.seconds)
        console.print(f"{summary.answer_tokens} tokens in {summary.seconds:.1f} s, {speed} tokens/s", markup=False)
    if shared:
        console.print(f"{shared} tokens of prompts were computed once for several lines", markup=False)
    if summary.remaining:
        raise typer.Exit(1)
