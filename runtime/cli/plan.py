"""`strata plan`: where every part of a model would run here and how fast, before anything is loaded."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from offload.errors import RequestError
from offload.gguf import GGUFFile
from planner.explain import render_plan
from runtime.cli.console import console, write_text
from runtime.cli.groups import grouped
from runtime.cli.options import AsJson, PlanOptions, model_path
from runtime.cli.planning import plan_by


@grouped
def command(
    *,
    options: PlanOptions,
    prompt_tokens: Annotated[
        int | None, typer.Option("-p", "--prompt-tokens", min=1, help="Length of prompt to predict for.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the plan here, for `strata run --plan`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a model would run here, and how fast."""
    with GGUFFile.open(model_path(options.model)) as gguf:
        plan = plan_by(options, gguf, loop=options.loop.value, prompt_tokens=prompt_tokens)
    if save is not None:
        try:
            save.write_text(plan.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write {save}: {error.strerror}") from error
        console.print(f"saved to {save}", markup=False)
    if as_json:
        write_text(plan.to_json() + "\n")
    else:
        render_plan(Console(highlight=False), plan)
