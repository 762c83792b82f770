"""`strata verify`: reads a whole store and compares every bundle with its checksum."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from offload.errors import FlashError, RequestError
from offload.gguf import GGUFFile
from offload.store import Store
from offload.store_files import MANIFEST_NAME
from offload.store_manifest import REBUILD_HINT
from planner.budget import format_size
from planner.folders import stores_folder
from planner.kernel_choice import measured_kernels
from runtime.architectures import describe
from runtime.cli.console import progress
from runtime.cli.options import model_path
from runtime.cli.pack import Folder

SHOWN_NAMES = 5


def command(
    *,
    name: Annotated[str, typer.Argument(metavar="STORE_OR_MODEL", help="A store's name or folder, or its GGUF file.")],
    folder: Folder = None,
) -> None:
    """Check a store for damage."""
    started = time.perf_counter()
    with opened(name, stores_folder(folder)) as store, progress(f"reading {store.folder.name}") as report:
        bad = store.verify(report)
        count, num_bytes = len(store.manifest.bundles), store.num_bytes
    if bad:
        shown = ", ".join(bad[:SHOWN_NAMES]) + (", ..." if len(bad) > SHOWN_NAMES else "")
        raise FlashError(f"{store.folder}: {len(bad)} of {count} bundles are damaged: {shown}", hint=REBUILD_HINT)
    seconds = time.perf_counter() - started
    Console(highlight=False, soft_wrap=True).print(
        f"{store.folder}: {count} bundles, {format_size(num_bytes)}, all as they were written ({seconds:.1f} s)",
        markup=False,
    )


def opened(name: str, root: Path) -> Store:
    """The store of that name in `root`, or in that folder, or of the model in that file."""
    for folder in (Path(name), root / name):
        if (folder / MANIFEST_NAME).is_file():
            return Store.open(folder)
    if (root / name).is_dir() or Path(name).is_dir():
        raise RequestError(f"{name} is not a finished store", hint="finish it with `strata pack`")
    from runtime.model_store import plan_store  # noqa: PLC0415 - brings the kernels' compiler

    with GGUFFile.open(model_path(name)) as gguf:
        plan = plan_store(gguf, describe(gguf), root, tuning=measured_kernels(gguf))
        if not plan.folder.exists():
            raise RequestError(f"{name} has no store in {root}", hint="make it with `strata pack`")
        return Store.open(plan.folder, plan.key)
