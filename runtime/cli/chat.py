"""`strata chat`: a conversation in the terminal; the KV of earlier turns is kept."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offload.errors import RequestError
from runtime.cli.console import console, write_text
from runtime.cli.draft_options import DraftingOptions, tell_drafts
from runtime.cli.groups import grouped
from runtime.cli.options import LaunchOptions, MaxTokens, Quiet, SamplingOptions
from runtime.cli.session_options import SessionOptions, ask, begin, save
from runtime.cli.signals import stop_at_token_boundary

if TYPE_CHECKING:
    from runtime.conversation import Conversation
    from runtime.engine import Engine

HELP = """\
/help         this list
/clear        forget the conversation, keep the system message
/save FILE    write the conversation as JSON
/stats        speeds of the last answer, tokens in the context
/exit         leave (also Ctrl-D)
A line that ends with \\ goes on in the next; \"\"\" opens and closes a block of lines.
Ctrl-C stops an answer at a token boundary; what was said is kept."""

BLOCK = '"""'


@grouped
def command(
    *,
    launch: LaunchOptions,
    sampling: SamplingOptions,
    drafting: DraftingOptions,
    keeping: SessionOptions,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: MaxTokens = None,
    quiet: Quiet = False,
) -> None:
    """Talk with a model."""
    from runtime.cli.launch import answer, judge, running_engine  # noqa: PLC0415 - brings torch

    params = sampling.params()
    with keeping.opened() as saved, running_engine(launch, quiet=quiet, draft=drafting.choice()) as running:
        conversation = begin(running, keeping, saved, system=system, quiet=quiet)
        if not conversation.has_own_template:
            console.print("this file has no chat template: turns are written as User: / Assistant:")
        if sys.stdin.isatty() and not quiet:
            console.print("[dim]/help lists the commands[/]")
        for text in messages():
            if text.startswith("/"):
                if not obey(text, conversation, running):
                    break
                continue
            try:
                ids = ask(conversation, text, running.context_tokens)
            except RequestError as error:
                console.print(f"{error} ({error.hint})" if error.hint else str(error), markup=False)
                continue
            with stop_at_token_boundary() as cancelled:
                pieces = answer(
                    running,
                    ids,
                    sampling=params,
                    max_tokens=max_tokens,
                    stop=[*sampling.stop, *conversation.stops],
                    cancelled=cancelled,
                    session=conversation.session,
                    write=write_text,
                )
            write_text("\n")
            conversation.answer("".join(piece.text for piece in pieces))
            save(saved, conversation)
            if drafting.stats:
                tell_drafts(running, quiet=quiet, stats=True)
        judge(running, quiet=quiet)
        tell_drafts(running, quiet=quiet)


def messages() -> Iterator[str]:
    """The user's messages from stdin, joined over continued lines and blocks, until the end of input."""
    while True:
        line = _read_line("> ")
        if line is None:
            return
        if line.startswith(BLOCK):
            line = _block(line.removeprefix(BLOCK))
        while line.endswith("\\"):
            line = line.removesuffix("\\") + "\n" + (_read_line(". ") or "")
        if line.strip():
            yield line.strip()


def obey(text: str, conversation: "Conversation", engine: "Engine") -> bool:
    """Carry out a /command; False means leave."""
    name, _, argument = text.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/help":
        console.print(HELP, markup=False)
    elif name == "/clear":
        conversation.clear()
        console.print("cleared")
    elif name == "/save":
        _save(conversation, argument.strip())
    elif name == "/stats":
        _stats(conversation, engine)
    else:
        console.print(f"there is no command {name}; /help lists them", markup=False)
    return True


def _save(conversation: "Conversation", name: str) -> None:
    if not name:
        console.print("name a file: /save FILE")
        return
    try:
        conversation.save(Path(name))
    except RequestError as error:
        console.print(str(error), markup=False)
    else:
        console.print(f"saved to {name}", markup=False)


def _stats(conversation: "Conversation", engine: "Engine") -> None:
    from planner.explain import render_comparison  # noqa: PLC0415 - with the engine's other halves

    held = conversation.session.kv.length
    console.print(f"{held} of {engine.context_tokens} tokens of context in use")
    if engine.measured is not None:
        render_comparison(console, engine.plan.predicted, engine.measured, engine.plan.budget)
    tell_drafts(engine, quiet=False, stats=True)
    for replan in engine.replanned:
        console.print(f"after {replan.token} tokens: {replan}", markup=False)


def _read_line(prompt: str) -> str | None:
    """One line without its end, None at the end of input; the prompt shows on a terminal only."""
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            return input(prompt)
        line = sys.stdin.readline()
    except EOFError:
        return None
    return line.rstrip("\r\n") if line else None


def _block(first: str) -> str:
    """The lines up to the closing quotes."""
    lines = [first]
    while not lines[-1].rstrip().endswith(BLOCK):
        line = _read_line(". ")
        if line is None:
            break
        lines.append(line)
    return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")
