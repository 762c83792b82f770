"""From a command line to a running engine: file, plan shown, weights loaded with progress, prediction judged.

Shared by every command that generates; knows nothing of what they do with the engine.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from offload.errors import RequestError
from offload.gguf import GGUFFile
from planner.draft_choice import DraftWish
from planner.explain import render_comparison, render_plan
from planner.gpu_choice import FOUND
from planner.plan import Plan
from planner.solve import for_prompt
from runtime.cli.console import console, progress
from runtime.cli.options import LaunchOptions, model_path, read_text_file
from runtime.cli.planning import plan_by, plan_in
from runtime.cli.streaming import describe_streaming
from runtime.engine import Engine
from runtime.executor.base import PrefetchingExecutor
from runtime.generation import Piece
from runtime.sampler import SamplingParams
from runtime.session import Session
from runtime.speculative.known import draft_wish
from runtime.speculative.options import DraftOptions
from runtime.text import ModelText


@contextmanager
def opened(launch: LaunchOptions) -> Iterator[tuple[GGUFFile, ModelText]]:
    """The model's file and its text side; nothing but the header is read."""
    template = read_text_file(launch.template_file) if launch.template_file else None
    with GGUFFile.open(model_path(launch.model)) as gguf, ModelText(gguf, chat_template=template) as text:
        yield gguf, text


@contextmanager
def running(
    launch: LaunchOptions,
    gguf: GGUFFile,
    text: ModelText,
    *,
    quiet: bool,
    prompt_tokens: int | None = None,
    draft: DraftOptions | None = None,
) -> Iterator[Engine]:
    """Show the plan on stderr (unless quiet) with speeds for that length of prompt, and load with progress."""
    wish = None if draft is None or launch.plan_file is not None else draft_wish(draft, gguf, text.tokenizer)
    plan = _plan(launch, gguf, prompt_tokens, wish)
    if not quiet:
        render_plan(console, plan)
        console.print()
    with progress("loading") as report:
        engine = Engine(gguf, plan, text=text, draft=draft, on_load=report)
    if isinstance(engine.executor, PrefetchingExecutor):
        engine.executor.set_prefetch(launch.prefetch)
    with engine:
        yield engine


@contextmanager
def running_engine(launch: LaunchOptions, *, quiet: bool, draft: DraftOptions | None = None) -> Iterator[Engine]:
    """`opened` and `running` in one, for commands whose prompts come later."""
    with opened(launch) as (gguf, text), running(launch, gguf, text, quiet=quiet, draft=draft) as engine:
        yield engine


def _plan(launch: LaunchOptions, gguf: GGUFFile, prompt_tokens: int | None, drafts: DraftWish | None) -> Plan:
    """The plan of the plan file, which must be of this model, or the planner's."""
    if launch.plan_file is None:
        return plan_by(
            launch,
            gguf,
            loop=launch.loop_name,
            prompt_tokens=prompt_tokens,
            on_this_machine=True,
            drafts=drafts,
        )
    if not launch.kv.is_plain:
        raise RequestError(
            "-ctk, -ctv and --kv-budget do not go with --plan: the plan says what the KV cache is like",
            hint="leave them out, or plan anew with them",
        )
    if launch.kv_ram is not None:
        raise RequestError("--kv-ram does not go with --plan: the plan says it", hint="leave it out, or plan anew")
    if launch.gpu != FOUND:
        raise RequestError("--gpu does not go with --plan: the plan says which GPU", hint="give one of them")
    plan = plan_in(launch.plan_file, gguf)
    return plan if prompt_tokens is None else for_prompt(plan, gguf, prompt_tokens)


def answer(
    engine: Engine,
    ids: Sequence[int],
    *,
    sampling: SamplingParams,
    max_tokens: int | None,
    stop: Sequence[str],
    cancelled: threading.Event,
    write: Callable[[str], None],
    session: Session | None = None,
) -> list[Piece]:
    """Generate with a progress bar until the first token, then hand each piece of text to `write`."""
    with progress("reading the prompt", unit="tokens") as report:
        stream = engine.generate(
            ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            session=session,
            cancelled=cancelled,
            on_prefill=report,
        )
        pieces = list(itertools.islice(stream, 1))
    for piece in pieces:
        write(piece.text)
    for piece in stream:
        pieces.append(piece)
        write(piece.text)
    return pieces


def judge(engine: Engine, *, quiet: bool) -> None:
    """Keep what the last run measured for later predictions, and show it beside the prediction."""
    measured = engine.learn()
    if measured is not None and not quiet:
        console.print()
        if engine.plan.is_simulated:
            console.print("the GPU is simulated: so are these speeds", style="yellow")
        render_comparison(console, engine.plan.predicted, measured, engine.plan.budget)
        if engine.cache_counts is not None:
            console.print(describe_streaming(engine.cache_counts), markup=False)


def speeds(engine: Engine) -> dict[str, Any]:
    """Prediction and measurement under the keys of `strata plan --json`, and where the run departed from the plan."""
    return {
        "gpu": engine.plan.machine.gpu,  # says "simulated" where it is
        "replanned": [asdict(replan) for replan in engine.replanned],
        "streamed": engine.cache_counts.as_dict() if engine.cache_counts is not None else None,
        "drafts": engine.speculation.totals.as_dict() if engine.speculation else None,
        "predicted": engine.plan.predicted.as_dict(),
        "measured": engine.measured.as_dict() if engine.measured else None,
    }
