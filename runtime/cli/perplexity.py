"""`strata perplexity`: the protocol of llama-perplexity, so that figures can be compared."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from runtime.cli.console import console, write_json, write_text
from runtime.cli.groups import grouped
from runtime.cli.options import AsJson, LaunchOptions, read_text_file

DEFAULT_CONTEXT_TOKENS = 512


@grouped
def command(
    *,
    launch: LaunchOptions,
    file: Annotated[Path, typer.Option("-f", "--file", help="UTF-8 text to score; `-` is stdin.")],
    chunks: Annotated[int | None, typer.Option("--chunks", help="Score at most so many chunks.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a text: the lower, the better the model predicts it."""
    from runtime.cli.launch import running_engine  # noqa: PLC0415 - brings torch
    from runtime.perplexity import perplexity  # noqa: PLC0415

    launch = replace(launch, context=launch.context or DEFAULT_CONTEXT_TOKENS)
    text = read_text_file(file)
    with running_engine(launch, quiet=True) as running:
        ids = running.tokenizer.encode(text, add_special=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("scoring")
            result = perplexity(
                running.logits,
                ids,
                context_tokens=running.context_tokens,
                bos_id=running.tokenizer.bos_id if running.tokenizer.add_bos else None,
                max_chunks=chunks,
                progress=lambda done, total, value: bar.update(
                    task, completed=done, total=total, description=f"perplexity {value:.4f}"
                ),
            )
    if as_json:
        write_json({**asdict(result), "perplexity": result.value, "context_tokens": launch.context})
    else:
        scored = f"{result.chunks} chunks of {launch.context} tokens"
        write_text(f"perplexity {result.value:.4f} +/- {result.standard_error:.5f} ({scored})\n")
