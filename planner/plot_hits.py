"""Pictures of how a cache's hit rate grows with its slots, a line for each policy.

Needs the extra `plot` (matplotlib). Knows nothing about how hits were counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from offload.errors import RequestError


def plot_hits(curves: Mapping[str, Sequence[tuple[int, float]]], bound: str, title: str, path: Path) -> None:
    """Write (slots, hit rate) curves to `path`, in the form its suffix names; the one called `bound` is dashed.

    RequestError without matplotlib, or where writing fails.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise RequestError(
            "pictures need matplotlib, which is not installed", hint="pip install 'strata[plot]'"
        ) from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(
            [slots for slots, _ in points],
            [100 * rate for _, rate in points],
            "k--" if name == bound else "o-",
            label=name,
        )
    axes.set(xlabel="slots", ylabel="% of lookups that hit", ylim=(0, 100), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot write the picture {path}: {error}") from error
