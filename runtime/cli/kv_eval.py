"""`strata kv-eval`: what smaller types of the KV cache, or reading a part of it, cost in quality on a user's text."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import RequestError
from runtime.cli.console import progress, write_json, write_text
from runtime.cli.groups import grouped
from runtime.cli.options import AsJson, CacheType, LaunchOptions, LoopChoice, read_text_file

if TYPE_CHECKING:
    from runtime.kv_eval import PolicyScore
    from runtime.tokenizer import Tokenizer

DEFAULT_CONTEXT_TOKENS = 512
CACHES = 5  # of float16's bytes, that all policies' together stay below
POLICIES = (
    *(KVPolicy(kind, kind) for kind in KVType if kind is not KVType.F16),
    KVPolicy(KVType.Q8_0, KVType.Q4_0),
)


@grouped
def command(
    *,
    launch: LaunchOptions,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="UTF-8 text to score; `-` is stdin. Without: the questions'.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help="Ask these in place of needles: lines of JSON with a prompt and an answer."),
    ] = None,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Score at most so many chunks.")] = None,
    every_layer: Annotated[
        bool, typer.Option("--every-layer", help="First and last layer too, which else keep at least 8 bits.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the scores to this file (the extra `plot`).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the KV cache's types with float16: perplexity, divergence, retrieval.

    -ctk, -ctv, --kv-budget: these alone.
    """
    from runtime.cli.launch import running_engine  # noqa: PLC0415 - brings numba
    from runtime.executor.program import ProgramExecutor  # noqa: PLC0415
    from runtime.kv_eval import evaluate  # noqa: PLC0415
    from runtime.kv_questions import read_questions  # noqa: PLC0415
    from runtime.plot_kv_eval import plot_scores  # noqa: PLC0415

    policies = POLICIES if launch.kv.is_plain else (launch.kv,)
    policies = tuple(replace(policy, keeps_edges=not every_layer) for policy in policies)
    context = launch.context or DEFAULT_CONTEXT_TOKENS
    loop = LoopChoice.PROGRAM if launch.loop is LoopChoice.AUTO else launch.loop
    plain = replace(
        launch,
        context=CACHES * context,
        cache_type_k=CacheType.F16,
        cache_type_v=CacheType.F16,
        kv_budget=None,
        loop=loop,
        gpu="off",
    )
    if file is None and questions is None:
        raise RequestError("there is nothing to score", hint="give a text with -f, or questions with --questions")
    asked = "" if questions is None else read_text_file(questions)
    with running_engine(plain, quiet=True) as running:
        if not isinstance(running.executor, ProgramExecutor):
            raise RequestError(f"the {plain.loop_name} loop keeps float16 alone", hint="leave out --loop and --engine")
        encode = partial(_encode, running.tokenizer)
        told = read_questions(asked, str(questions), encode) if questions is not None else []
        text = [token for question in told for token in (*question.prompt, *question.answer)]
        with progress("scoring", unit="runs") as report:
            scores = evaluate(
                running.executor,
                text if file is None else encode(read_text_file(file), True),
                policies,
                context_tokens=context,
                bos_id=running.tokenizer.bos_id if running.tokenizer.add_bos else None,
                max_chunks=chunks,
                questions=told,
                progress=report,
            )
        name = running.model_id
    if plot is not None:
        plot_scores(scores, f"{name}, {context} tokens", plot)
    if as_json:
        write_json({"model": name, "context_tokens": context, "scores": [asdict(score) for score in scores]})
    else:
        write_text(_table(scores))


def _encode(tokenizer: "Tokenizer", text: str, begins: bool) -> list[int]:
    return tokenizer.encode(text, add_special=begins)


def _table(scores: Sequence["PolicyScore"]) -> str:
    """The scores as Markdown."""
    lines = [
        "| keys/values | bytes | read | perplexity | more | KL mean | KL 99% | same top | found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        more = score.perplexity - scores[0].perplexity
        needle = "" if score.retrieved is None else f"{100 * score.retrieved:.1f}%"
        sizes = f"{100 * score.share:.1f}% | {100 * score.read:.1f}%"
        lines.append(
            f"| {score.policy} | {sizes} | {score.perplexity:.4f} | {more:+.4f} "
            f"| {score.divergence:.2e} | {score.worst:.2e} | {100 * score.same_top:.2f}% | {needle} |"
        )
    return "\n".join(lines) + "\n"
