"""`strata kv-eval`: what smaller types of the KV cache cost in quality, on a text of the user's."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import RequestError
from runtime.cli.console import progress, write_json, write_text
from runtime.cli.groups import grouped
from runtime.cli.options import AsJson, LaunchOptions, LoopChoice, read_text_file

if TYPE_CHECKING:
    from runtime.kv_eval import PolicyScore

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
    file: Annotated[Path, typer.Option("-f", "--file", help="UTF-8 text to score; `-` is stdin.")],
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Score at most so many chunks.")] = None,
    every_layer: Annotated[
        bool, typer.Option("--every-layer", help="First and last layer too, which else keep at least 8 bits.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the scores to this file (the extra `plot`).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the KV cache's types with float16: perplexity, divergence, retrieval. -ctk, -ctv: these alone."""
    from runtime.cli.launch import running_engine  # noqa: PLC0415 - brings numba
    from runtime.executor.program import ProgramExecutor  # noqa: PLC0415
    from runtime.kv_eval import evaluate  # noqa: PLC0415
    from runtime.plot_kv_eval import plot_scores  # noqa: PLC0415

    policies = POLICIES if launch.kv.is_plain else (launch.kv,)
    policies = tuple(replace(policy, keeps_edges=not every_layer) for policy in policies)
    context = launch.context or DEFAULT_CONTEXT_TOKENS
    loop = LoopChoice.PROGRAM if launch.loop is LoopChoice.AUTO else launch.loop
    plain = replace(
        launch, context=CACHES * context, cache_type_k=KVType.F16, cache_type_v=KVType.F16, loop=loop, gpu="off"
    )
    text = read_text_file(file)
    with running_engine(plain, quiet=True) as running:
        if not isinstance(running.executor, ProgramExecutor):
            raise RequestError(f"the {plain.loop_name} loop keeps float16 alone", hint="leave out --loop and --engine")
        with progress("scoring", unit="runs") as report:
            scores = evaluate(
                running.executor,
                running.tokenizer.encode(text, add_special=True),
                policies,
                context_tokens=context,
                bos_id=running.tokenizer.bos_id if running.tokenizer.add_bos else None,
                max_chunks=chunks,
                progress=report,
            )
        name = running.model_id
    if plot is not None:
        plot_scores(scores, f"{name}, {context} tokens", plot)
    if as_json:
        write_json({"model": name, "context_tokens": context, "scores": [asdict(score) for score in scores]})
    else:
        write_text(_table(scores))


def _table(scores: Sequence["PolicyScore"]) -> str:
    """The scores as Markdown."""
    lines = [
        "| keys/values | bytes | perplexity | more | KL mean | KL 99% | same top | needle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        more = score.perplexity - scores[0].perplexity
        needle = "" if score.retrieved is None else f"{100 * score.retrieved:.1f}%"
        lines.append(
            f"| {score.policy} | {100 * score.share:.1f}% | {score.perplexity:.4f} | {more:+.4f} "
            f"| {score.divergence:.2e} | {score.worst:.2e} | {100 * score.same_top:.2f}% | {needle} |"
        )
    return "\n".join(lines) + "\n"
