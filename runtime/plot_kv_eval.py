"""A picture of what the KV cache's types cost in quality, over the bytes they take.

Needs the extra `plot` (matplotlib). Knows nothing about how scores were measured.
"""

from collections.abc import Sequence
from pathlib import Path

from offload.errors import RequestError
from runtime.kv_eval import PolicyScore


def plot_scores(scores: Sequence[PolicyScore], title: str, path: Path) -> None:
    """Write divergence and perplexity over bytes to `path`, in the form its suffix names; the first score is float16's.

    RequestError without matplotlib, or where writing fails.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise RequestError(
            "pictures need matplotlib, which is not installed", hint="pip install 'strata[plot]'"
        ) from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    plain = scores[0].perplexity
    for score in scores[1:]:
        for axes, value in ((left, score.divergence), (right, score.perplexity - plain)):
            axes.plot([100 * score.share], [value], "o")
            axes.annotate(score.policy, (100 * score.share, value), textcoords="offset points", xytext=(5, 5))
    left.set(xlabel="% of float16's bytes", ylabel="KL divergence, nats a token", yscale="log", title=title)
    right.set(xlabel="% of float16's bytes", ylabel="perplexity more than with float16", title=title)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot write the picture {path}: {error}") from error
