"""Options of commands that keep KV beyond a process, and the conversation that they ask for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from offload.errors import FlashError
from offload.kv_session_folder import BlockFolder
from planner.budget import parse_size
from runtime.cli.console import console
from runtime.session_prefix import DEFAULT_LIMIT, PrefixCache, Worth, prefix_folder
from runtime.session_saved import SavedSession

if TYPE_CHECKING:
    from runtime.conversation import Conversation
    from runtime.engine import Engine

_PANEL = "Sessions"
OFF = "off"
RESERVE_SHARE = 4  # a quarter of the context is kept for the answer before old turns are dropped

PrefixLimit = Annotated[
    str,
    typer.Option(
        "--prefix-cache",
        help="Drive space for the KV of prompts that later ones may begin with, e.g. 2GiB; off: none. `run` has one "
        "with --session alone.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What outlives the process."""

    session: Annotated[
        str | None,
        typer.Option("--session", help="Go on with this conversation, or begin it.", rich_help_panel=_PANEL),
    ] = None
    prefix_cache: PrefixLimit = DEFAULT_LIMIT

    @contextmanager
    def opened(self) -> Iterator[SavedSession | None]:
        """The session that is asked for, held until the end; before a model is loaded, since another may use it."""
        prefixes(self.prefix_cache)  # refused before a model is loaded
        if self.session is None:
            yield None
            return
        with SavedSession(self.session) as saved:
            yield saved


def prefixes(limit: str) -> BlockFolder | None:
    """The folder of the prefix cache, None where there is none; RequestError for a limit that is no size."""
    return None if limit == OFF else prefix_folder(parse_size(limit))


def use_prefixes(engine: "Engine", limit: str, worth: Worth) -> None:
    """From now on the engine's prompts begin with what the prefix cache has; RequestError for a limit that is none."""
    folder = prefixes(limit)
    if folder is not None:
        engine.rows = PrefixCache(engine.rows_keys(), folder, worth)


def begin(
    engine: "Engine", keeping: SessionOptions, saved: SavedSession | None, *, system: str | None, quiet: bool
) -> "Conversation":
    """A conversation of the engine, which goes on where `saved` was; RequestError for options that do not go with it.

    Says where it goes on, and why its KV cannot be used if so.
    """
    from runtime.conversation import Conversation  # noqa: PLC0415 - brings torch

    if saved is None:
        use_prefixes(engine, keeping.prefix_cache, Worth.FIRST)
        return Conversation(engine, system=system)
    conversation = Conversation(engine, system=system)
    also = prefixes(keeping.prefix_cache)
    refusal = saved.use(engine.rows_keys(), conversation.session.kv, [also] if also is not None else [])
    conversation.session.rows = saved
    document = saved.document
    conversation.resume(() if document is None else document.messages)
    if document is None and refusal is not None:
        console.print(f"session {saved.name}: {refusal}: the messages alone are kept", markup=False)
    elif document is not None and refusal is not None:
        console.print(f"session {saved.name}: its KV is computed again, it does not fit: {refusal}", markup=False)
    elif document is not None and not quiet:
        tokens = len(document.token_ids)
        console.print(f"session {saved.name}: {len(document.messages)} messages, {tokens} tokens of KV", markup=False)
    return conversation


def ask(conversation: "Conversation", text: str, context_tokens: int) -> list[int]:
    """The token ids for an answer to the user's message; says what was dropped for them to fit. RequestError."""
    turn = conversation.ask(text, reserve_tokens=context_tokens // RESERVE_SHARE)
    if turn.dropped:
        console.print(f"dropped the {len(turn.dropped)} oldest messages: the context is full", markup=False)
    return turn.token_ids


def save(saved: SavedSession | None, conversation: "Conversation") -> None:
    """Keeps what was said, if that is asked for; where it fails, says so: the session is then as it was."""
    if saved is None:
        return
    try:
        saved.save(conversation.messages, conversation.session)
    except FlashError as error:
        console.print(f"{error} ({error.hint})", markup=False)
