"""Layers of the same options as one kind, and the patterns that such layers can take.

A *pattern* is an assignment of one layer. It is judged among layers of the same pattern, by simulation: by how much a
round more of it lengthens the step. Knows nothing about models, nor how many layers should take which pattern.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import prod

from planner.placement import Assignment, Item, Option, PlacementProblem
from planner.simulate import step_seconds
from planner.stages import flash_seconds, link_seconds

ALL_PATTERNS = 256  # a kind with no more than these is small: all of them can be looked at


@dataclass(frozen=True, slots=True)
class PatternCost:
    """What a layer of a pattern takes of the step, of the loading lanes, and of the memories."""

    seconds: float
    flash_s: float
    link_s: float
    ram_bytes: int
    gpu_bytes: int


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers whose items have the same options; `one` of them is a problem of its own."""

    layers: tuple[tuple[int, ...], ...]  # positions of the items of each
    one: PlacementProblem
    timed: tuple[Item, ...]  # the same items, with the loads alone that count for a layer's time

    @property
    def repeats(self) -> bool:
        """Whether a layer follows others of its kind."""
        return len(self.layers) > 1

    @property
    def is_small(self) -> bool:
        """Whether all patterns can be looked at."""
        return prod(len(item.options) for item in self.one.items) <= ALL_PATTERNS

    def every(self) -> Iterator[Assignment]:
        """All patterns."""
        return product(*(range(len(item.options)) for item in self.one.items))

    def of(self, assignments: Iterable[Assignment]) -> Iterator[Assignment]:
        """The patterns that layers of the kind have in assignments of the whole problem, some of them repeatedly."""
        for assignment in assignments:
            for layer in self.layers:
                yield tuple(assignment[index] for index in layer)

    def near(self, pattern: Assignment) -> Iterator[Assignment]:
        """The pattern, and what differs from it in one item."""
        yield pattern
        for position, item in enumerate(self.one.items):
            for index in range(len(item.options)):
                if index != pattern[position]:
                    yield (*pattern[:position], index, *pattern[position + 1 :])

    def cost(self, pattern: Assignment) -> PatternCost:
        """What a layer of the pattern takes."""
        chosen = self.one.chosen(pattern)
        ram, gpu = self.one.held_bytes(pattern)
        return PatternCost(
            seconds=self._seconds(pattern),
            flash_s=sum(map(flash_seconds, chosen)),
            link_s=sum(map(link_seconds, chosen)),
            ram_bytes=ram,
            gpu_bytes=gpu,
        )

    def _seconds(self, pattern: Assignment) -> float:
        """How much longer three rounds of the pattern take than two; of a layer that is alone, how long it takes."""
        if not self.repeats:
            return self._rounds(pattern, 1)
        return self._rounds(pattern, 3) - self._rounds(pattern, 2)

    def _rounds(self, pattern: Assignment, count: int) -> float:
        items = tuple(replace(item, layer=number) for number in range(count) for item in self.timed)
        return step_seconds(replace(self.one, items=items), pattern * count)


def layer_kinds(problem: PlacementProblem) -> tuple[LayerKind, ...]:
    """The kinds of a problem in order of their first layers; an item outside of layers is a layer of its own."""
    kinds: dict[tuple[tuple[tuple[Option, ...], bool], ...], list[tuple[int, ...]]] = {}
    for layer, group in groupby(range(len(problem.items)), key=lambda index: problem.items[index].layer):
        positions = tuple(group)
        for block in [positions] if layer is not None else [(index,) for index in positions]:
            same = tuple((problem.items[index].options, problem.items[index].routed) for index in block)
            kinds.setdefault(same, []).append(block)
    return tuple(_kind(problem, layers) for layers in kinds.values())


def _kind(problem: PlacementProblem, layers: Sequence[tuple[int, ...]]) -> LayerKind:
    one = replace(problem, items=tuple(problem.items[index] for index in layers[0]))
    hides = len(layers) > 1 and not any(item.routed for item in one.items)
    return LayerKind(tuple(layers), one, _without_loads(one.items) if hides else one.items)


def _without_loads(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Loads ahead hide behind other layers of the kind, unless routed loads share their lanes."""
    return tuple(
        replace(item, options=tuple(replace(option, load_s=0.0, link_s=0.0) for option in item.options))
        for item in items
    )
