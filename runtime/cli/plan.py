"""`strata plan`: where every part of a model would run and how fast, before anything is loaded, and what would help.

For this machine, or one that is described; the same search answers what-if, why, and which of several files.
"""

from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from offload.errors import RequestError
from planner import document
from planner.compare import ranked
from planner.explain import render_plan
from planner.explain_choices import best_line, render_kv_costs, render_ranking, render_what_if, render_why
from planner.gpu_choice import FOUND
from planner.kv_costs import kv_costs
from planner.llama_cpp_flags import llama_cpp_flags
from planner.machine_files import MACHINES
from planner.plan import Objective, Plan
from planner.question import Question
from planner.schedule import schedule
from planner.simulate import simulate, write_trace
from planner.solve import solve_with_drafts
from planner.what_if import best_help, what_if
from planner.why import decode_step, why
from runtime.cli.console import console, write_json, write_text
from runtime.cli.draft_options import Draft, DraftMax
from runtime.cli.groups import grouped
from runtime.cli.headers import open_header
from runtime.cli.options import (
    AsJson,
    BudgetText,
    CacheType,
    CacheTypeK,
    CacheTypeV,
    Context,
    Gpu,
    KVBudget,
    KVRam,
    Loop,
    LoopChoice,
    PlanOptions,
    Threads,
)
from runtime.cli.planning import question_by
from runtime.cli.remote_names import download_command, is_remote
from runtime.speculative.known import draft_wish
from runtime.speculative.options import DEFAULT_MOST, OFF, DraftOptions
from runtime.tokenizer import Tokenizer


class Peer(StrEnum):
    """Runtimes that a plan can be written for."""

    LLAMA_CPP = "llama.cpp"


@grouped
def command(
    *,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...", help="The model: a file, a URL or hf:org/repo:QUANT; with --compare several."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="The same as FILE.")] = None,
    context: Context = None,
    threads: Threads = None,
    budget: BudgetText = None,
    loop: Loop = LoopChoice.AUTO,
    gpu: Gpu = FOUND,
    cache_type_k: CacheTypeK = CacheType.AUTO,
    cache_type_v: CacheTypeV = CacheType.AUTO,
    kv_budget: KVBudget = None,
    kv_ram: KVRam = None,
    draft: Draft = OFF,
    draft_max: DraftMax = DEFAULT_MOST,
    machine: Annotated[
        str | None,
        typer.Option("--machine", help=f"Plan for a described machine: {', '.join(MACHINES)}, or a JSON file."),
    ] = None,
    objective: Annotated[Objective, typer.Option("--objective", help="What to be quick at.")] = Objective.LATENCY,
    prompt_tokens: Annotated[
        int | None, typer.Option("-p", "--prompt-tokens", min=1, help="Length of prompt to predict for.")
    ] = None,
    ask_what_if: Annotated[
        bool, typer.Option("--what-if", help="More memory or threads, another quant type, other contexts.")
    ] = False,
    unit: Annotated[
        str | None, typer.Option("--why", metavar="UNIT", help="The options of a unit, e.g. blk.3.experts.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Rank the files by predicted speed.")] = False,
    peer: Annotated[Peer | None, typer.Option("--for", help="Print the flags of that runtime for the plan.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a simulated step here, for chrome://tracing or Perfetto.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the plan here, for `strata run --plan`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a model would run, and how fast."""
    names = [*([model] if model is not None else []), *(files or [])]
    drafting = DraftOptions(draft, draft_max)
    if drafting.is_on and (compare or machine is not None):
        raise RequestError("--draft is planned for one file and this machine", hint="leave out --compare and --machine")
    with ExitStack() as stack:
        headers = [stack.enter_context(open_header(name)) for name in _checked(names, compare=compare)]
        questions = [
            question_by(
                PlanOptions(name, context, threads, budget, loop, gpu, cache_type_k, cache_type_v, kv_budget, kv_ram),
                header,
                objective=objective,
                machine=machine,
                prompt_tokens=prompt_tokens,
            )
            for name, header in zip(names, headers, strict=True)
        ]
        drafts = draft_wish(drafting, headers[0], Tokenizer.from_gguf(headers[0])) if drafting.is_on else None
    if compare:
        _compare(questions, as_json=as_json)
        return
    plan = _with_next_step(solve_with_drafts(questions[0], drafts))
    question = replace(questions[0], budget=plan.budget)
    if save is not None:
        _save(plan, save)
    if trace is not None:
        _trace(question, plan, trace)
    if as_json:
        write_json(_document(question, plan, ask_what_if=ask_what_if, unit=unit, peer=peer))
    elif peer is not None:
        _print_flags(plan)
    else:
        _render(question, plan, ask_what_if=ask_what_if, unit=unit)


def _checked(names: list[str], *, compare: bool) -> list[str]:
    """The files to plan for: one, or with `compare` any number."""
    if not names:
        raise RequestError("no model is named", hint="name a GGUF file: strata plan -m FILE")
    if len(names) > 1 and not compare:
        raise RequestError(f"{len(names)} models are named, one is planned for", hint="rank several with --compare")
    return names


def _with_next_step(plan: Plan) -> Plan:
    """`plan`, which says what is to be done before it can be run where the model lies on a server."""
    if not is_remote(plan.model.path):
        return plan
    note = f"planned from the header on the server; to run it, first: {download_command(plan.model.path)}"
    return replace(plan, notes=(*plan.notes, note))


def _render(question: Question, plan: Plan, *, ask_what_if: bool, unit: str | None) -> None:
    """The plan for a person, with what else was asked for, or the one change that would help most."""
    out = Console(highlight=False)
    choices = why(question, plan, unit) if unit is not None else ()
    render_plan(out, plan)
    if unit is None and not ask_what_if and (best := best_help(question, plan)) is not None:
        out.print(Text("would help ", style="green").append(best_line(plan, best), style="default"))
    if choices:
        out.print()
        render_why(out, choices)
    if ask_what_if:
        out.print()
        render_what_if(out, plan, what_if(question, plan))
        out.print()
        render_kv_costs(out, kv_costs(question, plan))


def _document(question: Question, plan: Plan, *, ask_what_if: bool, unit: str | None, peer: Peer | None) -> Any:
    """The plan as JSON, with what else was asked for beside its own keys."""
    result = document.encode(plan)
    if ask_what_if:
        result["what_if"] = document.encode(what_if(question, plan))
        result["kv_costs"] = document.encode(kv_costs(question, plan))
    if unit is not None:
        result["why"] = document.encode(why(question, plan, unit))
    if peer is not None:
        result["llama_cpp"] = document.encode(llama_cpp_flags(plan))
    return result


def _compare(questions: list[Question], *, as_json: bool) -> None:
    files = ranked(questions)
    if as_json:
        write_json({"files": document.encode(files)})
    else:
        render_ranking(Console(highlight=False), files)


def _print_flags(plan: Plan) -> None:
    """One line of flags on stdout; where llama.cpp does otherwise than planned goes to stderr."""
    flags = llama_cpp_flags(plan)
    write_text(flags.line() + "\n")
    for line in flags.unlike:
        console.print(f"note {line}", markup=False)


def _trace(question: Question, plan: Plan, path: Path) -> None:
    """Write a step of decode as the plan's schedule runs it, and say in short what it shows."""
    timeline = simulate(schedule(*decode_step(question, plan)))
    write_trace(timeline, path)
    console.print(f"traced to {path}\n{timeline.summary()}", markup=False)


def _save(plan: Plan, path: Path) -> None:
    try:
        path.write_text(plan.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from error
    console.print(f"saved to {path}", markup=False)
