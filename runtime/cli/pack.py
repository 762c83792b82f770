"""`strata pack`: brings the weights of a model that streams from flash into this machine's layout, once."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from offload.errors import FlashError, ModelFormatError
from offload.gguf import GGUFFile
from offload.store import Store
from planner.budget import format_size
from planner.folders import stores_folder
from planner.host import available_threads
from planner.kernel_choice import measured_kernels
from runtime.architectures import describe
from runtime.cli import options
from runtime.cli.console import console, progress

if TYPE_CHECKING:
    from runtime.model_store import StorePlan

Folder = Annotated[
    Path | None, typer.Option("--folder", help="Where stores lie, if not in strata/stores of the user's cache.")
]


def command(
    *,
    model: options.Model,
    threads: options.Threads = None,
    folder: Folder = None,
) -> None:
    """Pack a model for streaming from flash; a run that was ended goes on where it was."""
    from runtime.model_store import build_store, plan_store  # noqa: PLC0415 - brings the kernels' compiler

    with GGUFFile.open(options.model_path(model)) as gguf:
        plan = plan_store(gguf, describe(gguf), stores_folder(folder), tuning=measured_kernels(gguf))
        out = Console(highlight=False, soft_wrap=True)
        if is_whole(plan):
            out.print(f"{plan.folder} is there already: {format_size(plan.num_bytes)}", markup=False)
            return
        started = time.perf_counter()
        with progress(f"packing {gguf.path.name}") as report:
            build_store(gguf, plan, threads=threads or available_threads(), progress=report)
        seconds = time.perf_counter() - started
        out.print(
            f"{plan.folder}: {len(plan.pieces)} bundles, {format_size(plan.num_bytes)} in {seconds:.1f} s",
            markup=False,
        )


def is_whole(plan: "StorePlan") -> bool:
    """Whether the store is there and, as far as its manifest and size tell, can be used; if not, says why."""
    if not plan.folder.exists():
        return False
    try:
        Store.open(plan.folder, plan.key).close()
    except (FlashError, ModelFormatError) as error:
        console.print(f"{error}: making it again", markup=False, soft_wrap=True)
        return False
    return True
