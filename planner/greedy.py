"""A quick placement: the next bytes of each memory go where they save most time for each byte.

Starts from what takes least memory and improves item by item. Quality: EXPERIMENTS.md states how far from the optimum
it was on random problems. Knows nothing about models.
"""

from collections.abc import Callable

from offload.tiers import Device
from planner.placement import Assignment, Option, PlacementProblem

Allowed = Callable[[Option], bool]
_PASSES = 4


_RULES: tuple[Allowed, ...] = (
    lambda option: True,
    lambda option: option.device is Device.CPU,
    lambda option: option.device is Device.GPU,
)


def can_fit(problem: PlacementProblem) -> bool:
    """Whether an assignment that fits is found; the same as whether `solve_greedy` finds any."""
    return any(_least(problem, _choices(problem, rule)) is not None for rule in _RULES)


def solve_greedy(problem: PlacementProblem) -> tuple[Assignment, ...]:
    """Assignments that fit: with all devices, with each alone as far as it goes. Empty where nothing fits."""
    found = (_solve(problem, rule) for rule in _RULES)
    return tuple(dict.fromkeys(assignment for assignment in found if assignment is not None))


def _solve(problem: PlacementProblem, allowed: Allowed) -> Assignment | None:
    choices = _choices(problem, allowed)
    chosen = _least(problem, choices)
    if chosen is None:
        return None
    ram, gpu = problem.held_bytes(tuple(chosen))
    for _ in range(_PASSES):
        moves = [
            (
                _density(problem.items[position].options[chosen[position]], problem.items[position].options[index]),
                position,
                index,
            )
            for position, indexes in enumerate(choices)
            for index in indexes
        ]
        changed = False
        for density, position, index in sorted(moves, key=lambda move: (-move[0], move[1], move[2])):
            old, new = (problem.items[position].options[number] for number in (chosen[position], index))
            if density <= 0 or _seconds(new) >= _seconds(old):
                continue
            more_ram, more_gpu = new.ram_bytes - old.ram_bytes, new.gpu_bytes - old.gpu_bytes
            if ram + more_ram <= problem.ram_bytes and gpu + more_gpu <= problem.gpu_bytes:
                chosen[position], ram, gpu, changed = index, ram + more_ram, gpu + more_gpu, True
        if not changed:
            break
    return tuple(chosen)


def _choices(problem: PlacementProblem, allowed: Allowed) -> list[list[int]]:
    """The allowed options of each item; all of an item that has none of them."""
    return [
        [index for index, option in enumerate(item.options) if allowed(option)] or list(range(len(item.options)))
        for item in problem.items
    ]


def _least(problem: PlacementProblem, choices: list[list[int]]) -> list[int] | None:
    """What takes least RAM, or least GPU memory, or the first relieved of what fills the GPU; None where none fits."""
    for key in (_ram_first, _gpu_first):
        chosen = [
            min(indexes, key=lambda index, item=item: (*key(item.options[index]), index))  # type: ignore[misc]
            for item, indexes in zip(problem.items, choices, strict=True)
        ]
        if problem.fits(tuple(chosen)):
            return chosen
        if key is _ram_first and (relieved := _relieved(problem, choices, chosen)) is not None:
            return relieved
    return None


def _relieved(problem: PlacementProblem, choices: list[list[int]], chosen: list[int]) -> list[int] | None:
    """`chosen` with items moved into RAM until the GPU holds the rest: those that take least of it for what they free.

    None where RAM does not hold them.
    """
    chosen = list(chosen)
    ram, gpu = problem.held_bytes(tuple(chosen))
    moves = []
    for position, indexes in enumerate(choices):
        old = problem.items[position].options[chosen[position]]
        index = min(indexes, key=lambda index: (*_gpu_first(problem.items[position].options[index]), index))
        new = problem.items[position].options[index]
        if freed := old.gpu_bytes - new.gpu_bytes:
            moves.append(((new.ram_bytes - old.ram_bytes) / freed, position, index))
    for _, position, index in sorted(moves):
        if gpu <= problem.gpu_bytes:
            break
        old, new = (problem.items[position].options[number] for number in (chosen[position], index))
        if ram + new.ram_bytes - old.ram_bytes <= problem.ram_bytes:
            chosen[position] = index
            ram, gpu = ram + new.ram_bytes - old.ram_bytes, gpu + new.gpu_bytes - old.gpu_bytes
    return chosen if gpu <= problem.gpu_bytes and ram <= problem.ram_bytes else None


def _ram_first(option: Option) -> tuple[int, int]:
    return option.ram_bytes, option.gpu_bytes


def _gpu_first(option: Option) -> tuple[int, int]:
    return option.gpu_bytes, option.ram_bytes


def _seconds(option: Option) -> float:
    return option.compute_s + option.load_s


def _density(old: Option, new: Option) -> float:
    """Seconds saved for each byte more that is held; without bound where no more is held."""
    saved = _seconds(old) - _seconds(new)
    more = max(new.ram_bytes - old.ram_bytes, 0) + max(new.gpu_bytes - old.gpu_bytes, 0)
    return saved / more if more else float("inf") if saved > 0 else 0.0
