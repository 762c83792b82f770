"""Shares items out between two devices that work side by side, so that the later of them is done early.

The first device computes its items from the head of the list, the second from the tail. An item of the first may have
to be moved to it before, and one that memory lacks is read for either. Knows nothing about what items are.

`costs` (3, items) float64, seconds: on the first device, on the second, and to move the item to the first, 0 where it
is there. `in_memory` (items) bool: what the second need not read. `read_s`: of one item, alone; 0 where none is read.
`is_firsts` (items) bool: which items are the first device's.
"""

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.native import jitted

Costs = NDArray[np.float64]
Flags = NDArray[np.bool_]


@jitted("float64(boolean[::1], float64[:, ::1], boolean[::1], float64)")
def makespan(is_firsts: Flags, costs: Costs, in_memory: Flags, read_s: float) -> float:
    """When both are done: moves follow each other, as reads do, and an item waits for its own.

    Where both read, the drive serves both so that their reads end together.
    """
    count = len(is_firsts)
    of_first = of_second = 0
    for item in range(count):
        if is_firsts[item]:
            of_first += costs[2, item] > 0
        else:
            of_second += not in_memory[item]
    reading_s = read_s * (of_first + of_second)
    first_read_s, second_read_s = reading_s / max(of_first, 1), reading_s / max(of_second, 1)
    first_s = second_s = there_s = read_until_s = 0.0
    for item in range(count):
        if is_firsts[item]:
            if costs[2, item] > 0:
                there_s += max(costs[2, item], first_read_s)
                first_s = max(first_s, there_s)
            first_s += costs[0, item]
    for item in range(count - 1, -1, -1):
        if not is_firsts[item]:
            if read_s > 0 and not in_memory[item]:
                read_until_s += second_read_s
                second_s = max(second_s, read_until_s)
            second_s += costs[1, item]
    return max(first_s, second_s)


@jitted("void(boolean[::1], float64[:, ::1])")
def from_both_ends(is_firsts: Flags, costs: Costs) -> None:
    """HybriMoE's list (arXiv:2504.05897): whoever would be done earlier takes the next item of its end."""
    head, tail = 0, len(is_firsts) - 1
    first_s = second_s = there_s = 0.0
    while head <= tail:
        there_then = there_s + costs[2, head]
        first_then = (max(first_s, there_then) if costs[2, head] > 0 else first_s) + costs[0, head]
        second_then = second_s + costs[1, tail]
        is_firsts[head if first_then <= second_then else tail] = first_then <= second_then
        if first_then <= second_then:
            first_s, there_s, head = first_then, there_then, head + 1
        else:
            second_s, tail = second_then, tail - 1


@jitted("void(boolean[::1], int64[::1], float64[:, ::1], boolean[::1], float64)")
def best_beginning(is_firsts: Flags, order: NDArray[np.int64], costs: Costs, in_memory: Flags, read_s: float) -> None:
    """The first device gets the items that `order` (items) begins with, as many as are best."""
    is_firsts[:] = False
    best, best_s = 0, makespan(is_firsts, costs, in_memory, read_s)
    for taken in range(len(order)):
        is_firsts[order[taken]] = True
        seconds = makespan(is_firsts, costs, in_memory, read_s)
        if seconds < best_s:
            best, best_s = taken + 1, seconds
    is_firsts[order[best:]] = False


@jitted("void(boolean[::1], int64, int64)")
def _exchange(is_firsts: Flags, first: int, second: int) -> None:
    """Of one and the same item: it changes its device."""
    is_firsts[first] = not is_firsts[first]
    if second != first:
        is_firsts[second] = not is_firsts[second]


@jitted("void(boolean[::1], float64[:, ::1], boolean[::1], float64)")
def improve(is_firsts: Flags, costs: Costs, in_memory: Flags, read_s: float) -> None:
    """Moves one item to the other device, or exchanges two, whichever gains most, as long as that gains."""
    best_s = makespan(is_firsts, costs, in_memory, read_s)
    while True:
        one, other = -1, -1
        for first in range(len(is_firsts)):
            for second in range(first, len(is_firsts)):
                if first != second and is_firsts[first] == is_firsts[second]:
                    continue
                _exchange(is_firsts, first, second)
                seconds = makespan(is_firsts, costs, in_memory, read_s)
                _exchange(is_firsts, first, second)
                if seconds < best_s:
                    best_s, one, other = seconds, first, second
        if one < 0:
            return
        _exchange(is_firsts, one, other)
