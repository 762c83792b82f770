"""Options for drafts, shared by the commands that generate: what proposes tokens, how many, and what is told of it.

Knows nothing of what the commands do with them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload.errors import RequestError
from runtime.cli.console import console
from runtime.speculative.options import DEFAULT_MOST, DEFAULT_TREE, OFF, DraftOptions

if TYPE_CHECKING:
    from runtime.engine import Engine

_PANEL = "Drafts"


def _option(*names: str, help: str, **settings: Any) -> Any:  # noqa: A002 - typer's own word
    return typer.Option(*names, help=help, rich_help_panel=_PANEL, **settings)


Draft = Annotated[
    str, _option("--draft", help="A smaller GGUF file with the same vocabulary, auto, ngram, FILE,ngram or off.")
]
DraftMax = Annotated[int, _option("--draft-max", help="Most tokens proposed at once, 1 to 16.")]


@dataclass(frozen=True, slots=True)
class DraftingOptions:
    """What proposes tokens for the model to check, several at a time; answers are the same without."""

    draft: Draft = OFF
    draft_max: DraftMax = DEFAULT_MOST
    draft_tree: Annotated[
        int,
        _option("--draft-tree", help="Most tokens of a tree of drafts, where one pays: 0 to 48, 0 for none."),
    ] = DEFAULT_TREE
    synthetic: Annotated[
        float | None,
        _option("--spec-synthetic", help="For benchmarks: drafts that are right with this chance, at --draft's cost."),
    ] = None
    rejection: Annotated[
        bool, _option("--spec-rejection", help="Rejection sampling: the same distribution, another text for a seed.")
    ] = False
    stats: Annotated[bool, _option("--stats", help="Show how drafts did: acceptance by position, times, gain.")] = False

    def choice(self) -> DraftOptions:
        """The same as the engine takes it; RequestError for a value out of range."""
        options = DraftOptions(self.draft, self.draft_max, self.synthetic, self.rejection, tree=self.draft_tree)
        if self.rejection and not options.is_on:
            raise RequestError("--spec-rejection without drafts", hint="give --draft, or leave it out")
        return options


def tell_drafts(engine: "Engine", *, quiet: bool, stats: bool = False) -> None:
    """What drafts gave in the last run, or that they were off; with `stats` the figures behind it."""
    if engine.speculation is None:
        if stats:
            planned = engine.plan.draft
            for line in planned.lines() if planned is not None else ("off; --draft turns them on",):
                console.print(f"drafts: {line}", markup=False)
        return
    if quiet and not stats:
        return
    totals = engine.speculation.totals
    console.print(totals.summary(), markup=False)
    for line in totals.lines() if stats else ():
        console.print(f"  {line}", markup=False)
