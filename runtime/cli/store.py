"""`strata store`: which stores there are, and their removal."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from offload.errors import RequestError
from offload.store_folder import StoreEntry, StoreState, list_stores, remove_store
from planner.budget import format_size
from planner.folders import stores_folder
from runtime.cli.console import write_json
from runtime.cli.options import AsJson
from runtime.cli.pack import Folder

USELESS = (StoreState.DAMAGED, StoreState.SOURCE_GONE, StoreState.SOURCE_CHANGED)

app = typer.Typer(no_args_is_help=True, help="List or remove what `strata pack` made.")


@app.command("ls")
def list_command(*, folder: Folder = None, as_json: AsJson = False) -> None:
    """List the stores, their sizes, and whether their models are still there."""
    entries = list_stores(stores_folder(folder))
    if as_json:
        write_json([as_document(entry) for entry in entries])
        return
    out = Console(highlight=False, soft_wrap=True)
    if not entries:
        out.print(f"no stores in {stores_folder(folder)}", markup=False)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("store", "size", "state", "made from"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for entry in entries:
        source = "" if entry.source is None else escape(str(entry.source))
        table.add_row(escape(entry.name), format_size(entry.num_bytes), entry.state.value, source)
    out.print(table)


@app.command("rm")
def remove_command(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="[STORE]", help="Names, as `ls` shows them.")] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="All that are damaged, or whose model is gone or was changed.")
    ] = False,
    folder: Folder = None,
) -> None:
    """Remove stores, finished or not."""
    if not names and not stale:
        raise RequestError("no store is named", hint="name one as `strata store ls` shows it, or give --stale")
    root = stores_folder(folder)
    entries = {entry.name: entry for entry in list_stores(root)}
    for name in names or ():
        if name not in entries:
            raise RequestError(f"there is no store {name} in {root}", hint="see `strata store ls`")
    out = Console(highlight=False, soft_wrap=True)
    for entry in entries.values():
        if entry.name in (names or ()) or (stale and entry.state in USELESS):
            remove_store(entry)
            out.print(f"removed {entry.name}, {format_size(entry.num_bytes)}", markup=False)


def as_document(entry: StoreEntry) -> dict[str, str | int | None]:
    """An entry as JSON values."""
    return {
        "name": entry.name,
        "folder": str(entry.folder),
        "bytes": entry.num_bytes,
        "state": entry.state.value,
        "source": None if entry.source is None else str(entry.source),
    }
