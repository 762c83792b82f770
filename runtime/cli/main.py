"""The command `strata`: registers the sub-commands and turns every typed error into one line and a hint.

Exit codes: 0 done, 1 the model or machine cannot do it, 2 a bad request, 130 interrupted.
"""

import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated

import typer
from rich.text import Text

from offload.errors import RequestError, StrataError
from runtime.cli import (
    batch,
    bench,
    cache,
    chat,
    doctor,
    inspect,
    kv_eval,
    pack,
    perplexity,
    plan,
    profile,
    run,
    session,
    store,
    tokenize,
    verify,
)
from runtime.cli.console import console, set_up_logging, write_text

app = typer.Typer(
    name="strata",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (run, chat, batch, plan, profile, inspect, doctor, pack, verify, tokenize, perplexity, kv_eval):
    app.command(name=module.__name__.rsplit(".", maxsplit=1)[-1].replace("_", "-"))(module.command)
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")
app.add_typer(store.app, name="store")
app.add_typer(session.app, name="session")


@dataclass(slots=True)
class State:
    """What the options before the command say."""

    debug: bool = False


def _show_version(wanted: bool) -> None:
    """The version on stdout, instead of any command."""
    if wanted:
        write_text(f"strata {metadata.version('strata')}\n")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="More log lines; twice: all.")] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run language models across the GPU memory, RAM and flash of this machine."""
    context.obj.debug = debug
    set_up_logging(verbose)


def main() -> None:
    """Entry point of the command."""
    state = State()
    try:
        app(obj=state)
    except StrataError as error:
        if state.debug:
            raise
        console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        if error.hint:
            console.print(Text.assemble(("hint: ", "bold"), error.hint), soft_wrap=True)
        sys.exit(2 if isinstance(error, RequestError) else 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
