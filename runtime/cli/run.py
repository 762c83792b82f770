"""`strata run`: one prompt, one answer streamed to stdout; the plan before it and the speeds after it on stderr."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload.errors import RequestError
from runtime.cli.console import console, write_json, write_text
from runtime.cli.draft_options import DraftingOptions, tell_drafts
from runtime.cli.groups import grouped
from runtime.cli.options import (
    AsJson,
    LaunchOptions,
    MaxTokens,
    Quiet,
    SamplingOptions,
    TraceFile,
    read_text_file,
)
from runtime.cli.session_options import SessionOptions, ask, begin, save
from runtime.cli.signals import stop_at_token_boundary
from runtime.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.generation import Piece
    from runtime.text import ModelText


@grouped
def command(
    *,
    launch: LaunchOptions,
    sampling: SamplingOptions,
    drafting: DraftingOptions,
    keeping: SessionOptions,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The prompt; without it and -f, what is piped in.")
    ] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt here; `-` is stdin.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message for the chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")] = False,
    max_tokens: MaxTokens = None,
    record: Annotated[
        Path | None, typer.Option("--record-routing", help="Write here which experts tokens used.")
    ] = None,
    trace_file: TraceFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt."""
    # The engine brings torch: imported when a command runs it, so that --help and the others start at once.
    from runtime.cli.launch import answer, judge, opened, running, speeds  # noqa: PLC0415

    text = _prompt_text(prompt, file)
    params = sampling.params()
    if raw and keeping.session is not None:
        raise RequestError("--session keeps a conversation, --raw has none", hint="leave out one of them")
    if record is not None and not record.parent.is_dir():
        raise RequestError(f"cannot write {record}: there is no folder {record.parent}", hint="make it first")
    with ExitStack() as stack:
        cancelled = stack.enter_context(stop_at_token_boundary())
        saved = stack.enter_context(keeping.opened())
        gguf, model_text = stack.enter_context(opened(launch))
        ids = _prompt_ids(model_text, text, system, raw=raw) if saved is None else model_text.prompt_ids(text)
        draft = drafting.choice()
        engine = stack.enter_context(
            running(launch, gguf, model_text, quiet=quiet, prompt_tokens=len(ids), draft=draft)
        )
        trace = None if trace_file is None else Trace(trace_file)
        if trace is not None:
            engine.trace(trace)
        conversation = None
        if saved is not None:
            conversation = begin(engine, keeping, saved, system=system, quiet=quiet)
            ids = ask(conversation, text, engine.context_tokens)
        recorder = engine.record_routing() if record is not None else None
        if not quiet and ids == model_text.prompt_ids(text):  # the answer goes on where the prompt ends
            console.print(text, style="dim", end="", markup=False, soft_wrap=True)
        pieces = answer(
            engine,
            ids,
            sampling=params,
            max_tokens=max_tokens,
            stop=sampling.stop if conversation is None else [*sampling.stop, *conversation.stops],
            cancelled=cancelled,
            session=None if conversation is None else conversation.session,
            write=_discard if as_json else write_text,
        )
        if conversation is not None:
            conversation.answer("".join(piece.text for piece in pieces))
            save(saved, conversation)
        if record is not None and recorder is not None:
            recorder.trace().save(record)
        if trace is not None:
            trace.write()
        if as_json:
            write_json(_document(pieces, len(ids)) | speeds(engine))
        else:
            write_text("\n")
        if cancelled.is_set() and not quiet:
            console.print("stopped at a token boundary")
        judge(engine, quiet=quiet)
        tell_drafts(engine, quiet=quiet, stats=drafting.stats)


def _document(pieces: "Sequence[Piece]", prompt_tokens: int) -> dict[str, Any]:
    """The answer for --json."""
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [piece.token_id for piece in pieces],
        "prompt_tokens": prompt_tokens,
        "finish_reason": pieces[-1].finish_reason if pieces else "cancelled",
    }


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt of -p or -f, or of a pipe where neither is given; RequestError where there is none, or two."""
    piped = "" if prompt is not None or file is not None or sys.stdin.isatty() else read_text_file(Path("-"))
    if not piped and (prompt is None) == (file is None):
        raise RequestError(
            "give the prompt with either -p TEXT or -f FILE", hint='strata run -m demo -p "Once upon a time"'
        )
    if file is not None:
        return read_text_file(file)
    return prompt if prompt is not None else piped


def _prompt_ids(model_text: "ModelText", text: str, system: str | None, *, raw: bool) -> list[int]:
    """By the chat template where there is one, unless the prompt shall be continued as it is."""
    if model_text.chat_template is not None and not raw:
        turns = [{"role": "system", "content": system}] if system else []
        return model_text.chat_ids([*turns, {"role": "user", "content": text}])
    if system:
        raise RequestError("--system needs a chat template", hint="drop --raw, or give --chat-template-file")
    ids = model_text.prompt_ids(text)
    if not ids:
        raise RequestError("the prompt is empty", hint="give at least one token of text")
    return ids


def _discard(_text: str) -> None:
    """With --json the text is in the document alone."""
