"""`strata session`: which conversations are kept, what was said in one, and their removal."""

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from offload.errors import FlashError, RequestError
from planner.budget import format_size
from runtime.cli.console import write_json
from runtime.cli.options import AsJson
from runtime.session_list import SessionEntry, list_sessions, remove_session
from runtime.session_saved import checked_name, sessions_folder

app = typer.Typer(no_args_is_help=True, help="List, show or remove the conversations of --session.")


@app.command("ls")
def list_command(*, as_json: AsJson = False) -> None:
    """List the sessions, their sizes, and whether they are in use."""
    entries = list_sessions(sessions_folder())
    if as_json:
        write_json([as_document(entry) for entry in entries])
        return
    out = Console(highlight=False, soft_wrap=True)
    if not entries:
        out.print(f"no sessions in {sessions_folder()}", markup=False)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("session", "messages", "tokens", "size", "saved", "state", "model"):
        table.add_column(title, justify="right" if title in ("messages", "tokens", "size") else "left", overflow="fold")
    for entry in entries:
        document = entry.document
        numbers = ("", "") if document is None else (str(len(document.messages)), str(len(document.token_ids)))
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_s))
        table.add_row(
            escape(entry.name), *numbers, format_size(entry.num_bytes), saved, escape(entry.state), escape(entry.model)
        )
    out.print(table)


@app.command("show")
def show_command(
    *,
    name: Annotated[str, typer.Argument(metavar="SESSION", help="A name, as `ls` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Show what was said in a session."""
    entry = _found([name])[0]
    if entry.fault is not None:
        raise FlashError(entry.fault, hint="remove it with `strata session rm`")
    messages = entry.document.messages if entry.document is not None else ()
    if as_json:
        write_json({**as_document(entry), "conversation": list(messages)})
        return
    out = Console(highlight=False, soft_wrap=True)
    for message in messages:
        out.print(f"[bold]{escape(str(message.get('role', '')))}:[/] {escape(str(message.get('content', '')))}")


@app.command("rm")
def remove_command(
    *, names: Annotated[list[str], typer.Argument(metavar="SESSION...", help="Names, as `ls` shows them.")]
) -> None:
    """Remove sessions: what was said, and its KV."""
    out = Console(highlight=False, soft_wrap=True)
    for entry in _found(names):
        remove_session(entry)
        out.print(f"removed {entry.name}, {format_size(entry.num_bytes)}", markup=False)


def as_document(entry: SessionEntry) -> dict[str, str | int | float | None]:
    """An entry as JSON values; `saved` in seconds since 1970."""
    document = entry.document
    return {
        "name": entry.name,
        "folder": str(entry.folder),
        "bytes": entry.num_bytes,
        "saved": entry.used_s,
        "state": entry.state,
        "fault": entry.fault,
        "model": entry.model or None,
        "messages": None if document is None else len(document.messages),
        "tokens": None if document is None else len(document.token_ids),
    }


def _found(names: list[str]) -> list[SessionEntry]:
    """The sessions of these names; RequestError where there is none."""
    root = sessions_folder()
    entries = {entry.name: entry for entry in list_sessions(root)}
    for name in names:
        if checked_name(name) not in entries:
            raise RequestError(f"there is no session {name} in {root}", hint="see `strata session ls`")
    return [entries[name] for name in dict.fromkeys(names)]
