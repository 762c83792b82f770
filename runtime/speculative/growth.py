"""Growing a tree of drafts: the candidate that most probably counts comes first (SpecExec, arXiv:2406.02532).

Knows nothing of models. Invariant: a candidate stands behind the one it follows, and none that follow each other in
the result is more probable than the one before it.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from runtime.speculative.draft import Candidate, Proposal, TreeGuide

Expand = Callable[[Sequence[int]], NDArray[np.float32]]
"""Takes drafted tokens; returns the logits (vocabulary,) behind them."""


def grow(source: str, guide: TreeGuide, expand: Expand) -> Proposal:
    """The tree that `guide` asks for. `expand` is one computation of `source`."""
    waiting: list[tuple[float, int, int, Candidate]] = []  # less the chance that it counts, order, parent's place
    candidates: list[Candidate] = []
    parents: list[int] = []
    ways: list[tuple[int, ...]] = []
    steps = pushed = 0

    def step(place: int, way: tuple[int, ...], reach: float) -> None:
        """Compute what may follow a candidate."""
        nonlocal steps, pushed
        steps += 1
        for candidate in guide.choose(way, expand(way)):
            pushed += 1
            heappush(waiting, (-reach * guide.chance(source, candidate), pushed, place, candidate))

    step(-1, (), 1.0)
    while waiting and len(candidates) < guide.most:
        less, _, parent, candidate = heappop(waiting)
        if not guide.worth_a_place(-less, len(candidates)):
            break
        way = (*(ways[parent] if parent >= 0 else ()), candidate.token_id)
        candidates.append(candidate)
        parents.append(parent)
        ways.append(way)
        if len(way) < guide.most_depth and len(candidates) < guide.most and guide.worth_a_step(-less, len(candidates)):
            step(len(candidates) - 1, way, -less)
    return Proposal(tuple(candidates), source, True, parents=tuple(parents), steps=steps)
