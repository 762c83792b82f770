"""The order and dependencies of a step's work: what is loaded when, what is computed where, what waits for what.

Plain data, made from a placement problem and an assignment; whoever carries a step out, on a machine or in a
simulation, does these tasks by one rule: *a lane does one task at a time, and when it is free it takes the first task
in order whose predecessors have ended*. Knows nothing about how a task is done or about memory.

- Items are computed in their order. Where the device changes, the one that takes over first spends the hand-over.
- An item's load ends before it is computed. Loads from flash to the GPU go over the flash lane, then over the link.
- Loads that no router decides are issued ahead, for at most `layers_ahead` of the layers that load (two: one is
  computed while the next arrives), since each needs a buffer until it is computed.
- Routed items of a layer are known when the item before them, their router, has computed: then their loads start. They
  do not wait for one another, so that what is resident is computed while the rest arrives, each as it lands, on both
  devices at once where they lie on both; the item behind them waits for all.

Invariants: the predecessors of a task stand before it, and each item has one compute task, the last of its tasks.
"""

from dataclasses import dataclass
from enum import StrEnum

from offload.tiers import Device, Tier
from planner.placement import Assignment, Item, Option, PlacementProblem

LAYERS_AHEAD = 2


class Lane(StrEnum):
    """What does one task at a time."""

    GPU = "gpu"
    LINK = "link"
    CPU = "cpu"
    FLASH = "flash"


@dataclass(frozen=True, slots=True)
class Task:
    """Work of a lane that starts when all of `after`, positions in the schedule, have ended."""

    name: str
    lane: Lane
    seconds: float
    after: tuple[int, ...] = ()


_COMPUTES = {Device.CPU: Lane.CPU, Device.GPU: Lane.GPU}


def schedule(
    problem: PlacementProblem, assignment: Assignment, *, layers_ahead: int = LAYERS_AHEAD
) -> tuple[Task, ...]:
    """The tasks of one step, in order of precedence.

    ValueError for `layers_ahead` below 1 and for an assignment that does not have one option for each item.
    """
    if layers_ahead < 1:
        raise ValueError(f"layers_ahead is {layers_ahead}: it must be at least 1")
    builder = _Builder(problem.handover_s, layers_ahead)
    previous: Item | None = None
    for item, option in zip(problem.items, problem.chosen(assignment), strict=True):
        joined = item.routed and previous is not None and previous.routed and previous.layer == item.layer
        builder.add(item, option, joined=joined)
        previous = item
    return tuple(builder.tasks)


class _Builder:
    """A schedule in the making."""

    def __init__(self, handover_s: float, layers_ahead: int) -> None:
        self.tasks: list[Task] = []
        self._handover_s = handover_s
        self._layers_ahead = layers_ahead
        self._done: list[tuple[int, Device]] = []  # compute tasks that the item now added waits for
        self._doing: list[tuple[int, Device]] = []  # those of its own: one, or the routed items of a layer
        self._entered: dict[Device, tuple[int, ...]] = {}  # what work on a device waits for, hand-over included
        self._loading: list[tuple[int | None, int]] = []  # layers that load ahead: (layer, its last compute task)

    def add(self, item: Item, option: Option, *, joined: bool) -> None:
        """The tasks of the next item; `joined` to the routed items before it."""
        if not joined:
            self._done, self._doing, self._entered = self._doing, [], {}
        after = self._enter(option.device)
        ahead = option.load_s > 0 and not item.routed
        if option.load_s > 0:
            start = self._buffer_free(item.layer) if ahead else tuple(index for index, _ in self._done)
            after = (*after, self._load(item.name, option, start))
        index = self._append(item.name, _COMPUTES[option.device], option.compute_s, after)
        self._doing.append((index, option.device))
        if ahead:
            if self._is_loading(item.layer):
                self._loading.pop()
            self._loading.append((item.layer, index))

    def _enter(self, device: Device) -> tuple[int, ...]:
        """What a compute task on `device` waits for: what was done there, and what is handed over from elsewhere."""
        if device not in self._entered:
            here = tuple(index for index, where in self._done if where is device)
            there = tuple(index for index, where in self._done if where is not device)
            if there:
                here = (*here, self._append(f"hand over to {device}", _COMPUTES[device], self._handover_s, there))
            self._entered[device] = here
        return self._entered[device]

    def _buffer_free(self, layer: int | None) -> tuple[int, ...]:
        """What a load ahead waits for: that the layer which used its buffer has been computed."""
        before = len(self._loading) - self._is_loading(layer)
        return (self._loading[before - self._layers_ahead][1],) if before >= self._layers_ahead else ()

    def _is_loading(self, layer: int | None) -> bool:
        """Whether the last item that loaded ahead was of the same layer; what is outside of layers stands alone."""
        return layer is not None and bool(self._loading) and self._loading[-1][0] == layer

    def _load(self, name: str, option: Option, start: tuple[int, ...]) -> int:
        """The load of an item from `start` on; the position of its last task."""
        if option.tier is not Tier.FLASH:
            return self._append(f"load {name}", Lane.LINK, option.load_s, start)
        read = self._append(f"load {name}", Lane.FLASH, max(option.load_s - option.link_s, 0.0), start)
        return self._append(f"copy {name}", Lane.LINK, option.link_s, (read,)) if option.link_s > 0 else read

    def _append(self, name: str, lane: Lane, seconds: float, after: tuple[int, ...]) -> int:
        self.tasks.append(Task(name, lane, seconds, after))
        return len(self.tasks) - 1
