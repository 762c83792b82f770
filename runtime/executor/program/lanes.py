"""Lanes: runs of tokens, each following the one before in a cache, that the steps of one pass are made of.

Several lanes may be of one cache: a tree of drafts, gone through depth first. Each lane then begins at its own position
and writes over what a branch before it has left there, so that what a token sees lies where plain decoding would have
put it; layers must go through the lanes in order. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.executor.base import Step
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.sequence_layout import SequenceLayout


@dataclass(frozen=True, slots=True)
class Lane:
    """Tokens of one sequence, to be put into its cache from position `start` on.

    `chooses`: they read blocks of their choice where the cache's policy sets a budget; else all.
    """

    token_ids: Sequence[int]
    kv: ProgramKV
    start: int
    chooses: bool = False

    @property
    def layout(self) -> SequenceLayout:
        """Of the cache, as these tokens read it."""
        return self.kv.choosing if self.chooses else self.kv.layout

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + len(self.token_ids)


def lanes_of(step: Step, kv: ProgramKV, most_tokens: int) -> list[Lane]:
    """The lanes of a step that is verified, behind what `kv` holds, of at most `most_tokens` tokens each."""
    depths = step.depths
    lanes: list[Lane] = []
    first = 0
    for place in range(1, len(depths) + 1):
        is_full = place - first == most_tokens
        if place == len(depths) or is_full or depths[place] != depths[place - 1] + 1:
            lanes.append(Lane(step.token_ids[first:place], kv, kv.length + depths[first], chooses=True))
            first = place
    return lanes
