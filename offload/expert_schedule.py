"""Who computes which of a layer's experts, CPU or GPU, and which ones are copied to the GPU for it.

Two rules: HybriMoE's schedule (arXiv:2504.05897) for a layer whose experts have many tokens, and a split of the misses
by bandwidth alone, cheap enough for every layer of every decoded token. Knows nothing of tensors, files or devices:
times are what was measured, given by the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

IMPROVED_EXPERTS = 16  # of more, one misplaced matters little, and all exchanges of two take milliseconds to try
CHOOSING_S = 2e-4  # until copies were chosen and begun, and it is known that they have ended

Seconds = Callable[[int], float]  # of an expert with so many tokens


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """What one expert takes. `read_s`: to read it from flash, one at a time, for either device; 0 where RAM has all."""

    gpu_s: Seconds
    cpu_s: Seconds
    move_s: float  # to copy it to the GPU, one at a time
    read_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpertSplit:
    """Indices of experts in the order in which a device computes them; of the GPU's, `moved` are copied, in order."""

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    moved: tuple[int, ...]
    makespan_s: float


def schedule_experts(
    tokens: Sequence[int], on_gpu: Sequence[bool], times: ExpertTimes, in_ram: Sequence[bool] | None = None
) -> ExpertSplit:
    """A split of one layer's experts, of which `on_gpu` need no copy; ValueError where the lengths differ.

    Where some must be read, the CPU need not read those that are `in_ram` (None: all), while every copy to the GPU is
    read; the drive serves both so that their reads end together.

    HybriMoE's list has the GPU's own experts by falling tokens, then the others likewise; the GPU takes from its head,
    the CPU from its tail, whoever would be done earlier with what it takes. Alone that is up to twice the optimum for
    few experts (one of many tokens that the GPU lacks always goes to the CPU first). So this begins with it and with
    the GPU taking those of most tokens, and goes on from both, as long as moving one expert or exchanging two gains.
    """
    layer = _Layer(tokens, on_gpu, times, [True] * len(tokens) if in_ram is None else in_ram)
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


def moving_saves_s(misses: int, times: ExpertTimes) -> float:
    """What copies of the best number of so many missing experts, with a token each, save of a layer.

    CHOOSING_S is taken off, which every layer takes where that is asked at all.
    """
    cpu_s, move_s = times.cpu_s(1), times.move_s
    best_s = min(max(moved * move_s, (misses - moved) * cpu_s) for moved in range(misses + 1))
    return misses * cpu_s - best_s - CHOOSING_S


class _Layer:
    """The experts of a layer and what each takes on either device."""

    def __init__(
        self, tokens: Sequence[int], on_gpu: Sequence[bool], times: ExpertTimes, in_ram: Sequence[bool]
    ) -> None:
        if not len(tokens) == len(on_gpu) == len(in_ram):
            raise ValueError(f"{len(tokens)} experts, and {len(on_gpu)} places of experts")
        self._in_ram, self._read_s = in_ram, times.read_s
        self.order = sorted(
            range(len(tokens)), key=lambda index: (not on_gpu[index], in_ram[index], -tokens[index], index)
        )
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
        read_s = [0.0 if there else self._read_s for there in self._in_ram]
        order = sorted(self.order, key=lambda index: -(self._cpu_s[index] + read_s[index]))
        step = max(len(order) // IMPROVED_EXPERTS, 1)  # of many, one misplaced matters little
        splits = [frozenset(order[:count]) for count in range(0, len(order) + 1, step)]
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
        """When both devices are done: copies follow each other, and an expert waits for its own, or for its read."""
        gpu_read_s, cpu_read_s = self._read_times(is_gpus) if self._read_s else (0.0, 0.0)
        gpu_s = cpu_s = moved_s = read_s = 0.0
        for index in self.order:
            if is_gpus[index]:
                if self._move_s[index]:
                    moved_s += max(self._move_s[index], gpu_read_s)
                    gpu_s = max(gpu_s, moved_s)
                gpu_s += self._gpu_s[index]
        for index in reversed(self.order):  # what is in RAM comes first
            if not is_gpus[index]:
                if cpu_read_s and not self._in_ram[index]:
                    read_s += cpu_read_s
                    cpu_s = max(cpu_s, read_s)
                cpu_s += self._cpu_s[index]
        return max(gpu_s, cpu_s)

    def _read_times(self, is_gpus: Sequence[bool]) -> tuple[float, float]:
        """What a read of the GPU's and one of the CPU's takes while the drive serves both."""
        gpus = sum(is_gpu and move_s > 0 for is_gpu, move_s in zip(is_gpus, self._move_s, strict=True))
        cpus = sum(not is_gpu and not there for is_gpu, there in zip(is_gpus, self._in_ram, strict=True))
        total_s = self._read_s * (gpus + cpus)
        return total_s / max(gpus, 1), total_s / max(cpus, 1)


def _neighbors(is_gpus: tuple[bool, ...]) -> list[tuple[bool, ...]]:
    """Splits in which one expert changes its device, or two exchange theirs."""
    count = len(is_gpus)
    pairs = [(first, second) for first in range(count) for second in range(first, count)]
    return [
        tuple(is_gpu != (index in pair) for index, is_gpu in enumerate(is_gpus))
        for pair in pairs
        if pair[0] == pair[1] or is_gpus[pair[0]] != is_gpus[pair[1]]
    ]
