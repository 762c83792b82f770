"""Who computes which of a layer's experts, CPU or GPU, and which ones are copied to the GPU for it.

Two rules: HybriMoE's schedule (arXiv:2504.05897) for a layer whose experts have many tokens, and a split of the misses
by bandwidth alone, cheap enough for every layer of every decoded token. Knows nothing of tensors, files or devices:
times are what was measured, given by the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

IMPROVED_EXPERTS = 16  # of more, one misplaced matters little, and all exchanges of two take milliseconds to try

Seconds = Callable[[int], float]  # of an expert with so many tokens


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """What one expert takes."""

    gpu_s: Seconds
    cpu_s: Seconds
    move_s: float  # to copy it to the GPU, one at a time


@dataclass(frozen=True, slots=True)
class ExpertSplit:
    """Indices of experts in the order in which a device computes them; of the GPU's, `moved` are copied, in order."""

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    moved: tuple[int, ...]
    makespan_s: float


def schedule_experts(tokens: Sequence[int], on_gpu: Sequence[bool], times: ExpertTimes) -> ExpertSplit:
    """A split of one layer's experts, of which `on_gpu` need no copy; ValueError where the lengths differ.

    HybriMoE's list has the GPU's own experts by falling tokens, then the others likewise; the GPU takes from its head,
    the CPU from its tail, whoever would be done earlier with what it takes. Alone that is up to twice the optimum for
    few experts (one of many tokens that the GPU lacks always goes to the CPU first). So this begins with it and with
    the GPU taking those of most tokens, and goes on from both, as long as moving one expert or exchanging two gains.
    """
    layer = _Layer(tokens, on_gpu, times)
    best_s, is_gpus = min(layer.improved(start) for start in (layer.greedy(), layer.heaviest()))
    gpu = tuple(index for index in layer.order if is_gpus[index])
    cpu = tuple(index for index in reversed(layer.order) if not is_gpus[index])
    return ExpertSplit(gpu, cpu, tuple(index for index in gpu if not on_gpu[index]), best_s)


def misses_to_move(misses: int, link_bytes_per_s: float, cpu_bytes_per_s: float) -> int:
    """Of so many experts that are not on the GPU, with a token each: how many to copy there; the CPU computes the rest.

    Both rates measured while the other one is in use. A copy takes in proportion to 1 - r and a computation on the CPU
    to r = link / (link + cpu), so that both end together near misses * r copies: the better of the two whole numbers.
    """
    if misses < 0 or link_bytes_per_s < 0 or cpu_bytes_per_s <= 0:
        raise ValueError(f"{misses} misses, {link_bytes_per_s} and {cpu_bytes_per_s} bytes per second")
    share = link_bytes_per_s / (link_bytes_per_s + cpu_bytes_per_s)
    low = min(floor(misses * share), misses)
    return min((low, min(low + 1, misses)), key=lambda moved: max(moved * (1 - share), (misses - moved) * share))


class _Layer:
    """The experts of a layer and what each takes on either device."""

    def __init__(self, tokens: Sequence[int], on_gpu: Sequence[bool], times: ExpertTimes) -> None:
        if len(tokens) != len(on_gpu):
            raise ValueError(f"{len(tokens)} experts, and {len(on_gpu)} places of experts")
        self.order = sorted(range(len(tokens)), key=lambda index: (not on_gpu[index], -tokens[index], index))
        self._gpu_s = [times.gpu_s(count) for count in tokens]
        self._cpu_s = [times.cpu_s(count) for count in tokens]
        self._move_s = [0.0 if there else times.move_s for there in on_gpu]

    def greedy(self) -> tuple[bool, ...]:
        """Which experts are the GPU's by HybriMoE's rule."""
        is_gpus = [False] * len(self.order)
        head, tail = 0, len(self.order) - 1
        gpu_s = cpu_s = moved_s = 0.0
        while head <= tail:
            first, last = self.order[head], self.order[tail]
            moved_then = moved_s + self._move_s[first]
            gpu_then = max(gpu_s, moved_then if self._move_s[first] else 0.0) + self._gpu_s[first]
            cpu_then = cpu_s + self._cpu_s[last]
            if gpu_then <= cpu_then:
                is_gpus[first] = True
                gpu_s, moved_s, head = gpu_then, moved_then, head + 1
            else:
                cpu_s, tail = cpu_then, tail - 1
        return tuple(is_gpus)

    def heaviest(self) -> tuple[bool, ...]:
        """The best of giving the GPU the experts that take the CPU longest."""
        order = sorted(self.order, key=lambda index: -self._cpu_s[index])
        splits = [frozenset(order[:count]) for count in range(len(order) + 1)]
        return min((tuple(index in split for index in range(len(order))) for split in splits), key=self.makespan_s)

    def improved(self, is_gpus: tuple[bool, ...]) -> tuple[float, tuple[bool, ...]]:
        """The makespan and the split when no exchange gains any more; of many experts those that were given."""
        best_s = self.makespan_s(is_gpus)
        while 0 < len(is_gpus) <= IMPROVED_EXPERTS:
            step_s, step = min((self.makespan_s(other), other) for other in _neighbors(is_gpus))
            if step_s >= best_s:
                break
            best_s, is_gpus = step_s, step
        return best_s, is_gpus

    def makespan_s(self, is_gpus: Sequence[bool]) -> float:
        """When both devices are done: copies follow each other, and an expert waits for its own."""
        gpu_s = cpu_s = moved_s = 0.0
        for index in self.order:
            if not is_gpus[index]:
                cpu_s += self._cpu_s[index]
                continue
            if self._move_s[index]:
                moved_s += self._move_s[index]
                gpu_s = max(gpu_s, moved_s)
            gpu_s += self._gpu_s[index]
        return max(gpu_s, cpu_s)


def _neighbors(is_gpus: tuple[bool, ...]) -> list[tuple[bool, ...]]:
    """Splits in which one expert changes its device, or two exchange theirs."""
    count = len(is_gpus)
    pairs = [(first, second) for first in range(count) for second in range(first, count)]
    return [
        tuple(is_gpu != (index in pair) for index, is_gpu in enumerate(is_gpus))
        for pair in pairs
        if pair[0] == pair[1] or is_gpus[pair[0]] != is_gpus[pair[1]]
    ]
