"""What a pass reads of chunks on flash alone, layer after layer, and the ranges of them that are attended to at once.

A layer's chunks come in ranges of a few: attention to a range begins when its chunks are there, and what they were read
to is free again when it is over. Programs are made for plans. Knows nothing about how chunks are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from offload.kv_chunks import Chunk
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_groups import first_seen
from runtime.executor.program.lanes import Lane

Run = tuple[int, int]
"""Pieces that follow each other: the first, and the one behind the last."""


@dataclass(slots=True)
class ColdRead:
    """A chunk that a pass reads: the tables it belongs to, and where in them."""

    chunk: Chunk
    places: list[tuple[ProgramKV, int]] = field(default_factory=list)  # sequence, piece


@dataclass(frozen=True, slots=True)
class ColdRange:
    """Chunks of a layer that are attended to at once, when the first `arrived` of all that the pass reads are there.

    `lanes`: the numbers of the lanes that see some of them, and those lanes' pieces.
    """

    arrived: int
    lanes: tuple[tuple[int, tuple[Run, ...]], ...]


@dataclass(frozen=True, slots=True)
class ColdPlan:
    """The ranges of each layer, in the order in which they are read."""

    layers: tuple[tuple[ColdRange, ...], ...]

    @classmethod
    def of(cls, layers: Sequence[Sequence[ColdRead]], lanes: Sequence[Lane], range_reads: int) -> "ColdPlan":
        """Of what is read of each layer, so many chunks a range."""
        numbers: dict[ProgramKV, list[int]] = {}
        for number, lane in enumerate(lanes):
            numbers.setdefault(lane.kv, []).append(number)
        before, ranges = 0, []
        for reads in layers:
            firsts = range(0, len(reads), range_reads)
            ranges.append(
                tuple(
                    ColdRange(
                        before + min(first + range_reads, len(reads)),
                        _runs_of_lanes(reads[first : first + range_reads], numbers),
                    )
                    for first in firsts
                )
            )
            before += len(reads)
        return cls(tuple(ranges))

    @property
    def ends(self) -> list[int]:
        """How many chunks are read up to the end of each range."""
        return [part.arrived for ranges in self.layers for part in ranges]

    def runs(self, layer: int, lane: int) -> list[tuple[Run, ...]]:
        """Of the ranges of a layer that a lane sees chunks of, the lane's pieces."""
        return [runs for part in self.layers[layer] for number, runs in part.lanes if number == lane]


def reads_of(layer: int, window: int | None, lanes: Sequence[Lane]) -> list[ColdRead]:
    """What a layer's attention sees of chunks on flash, each once. `window`: of the newest tokens; None for all."""
    found: dict[int, ColdRead] = {}
    for kv, start in {lane.kv: min(its.start for its in lanes if its.kv is lane.kv) for lane in lanes}.items():
        first = first_seen(window, start)
        for piece, chunk in enumerate(kv.chunks(layer)[first:], first):
            if chunk.memory is None:
                found.setdefault(id(chunk), ColdRead(chunk)).places.append((kv, piece))
    return list(found.values())


def gaps(runs: Sequence[Run]) -> Iterator[tuple[int, int | None]]:
    """Pieces between runs in rising order, before and behind them: as runs, the last without an end."""
    first = 0
    for begin, end in runs:
        if begin > first:
            yield first, begin
        first = end
    yield first, None


def _runs_of_lanes(
    reads: Sequence[ColdRead], numbers: dict[ProgramKV, list[int]]
) -> tuple[tuple[int, tuple[Run, ...]], ...]:
    pieces: dict[ProgramKV, list[int]] = {}
    for read in reads:
        for kv, piece in read.places:
            pieces.setdefault(kv, []).append(piece)
    return tuple((number, _runs(seen)) for kv, seen in pieces.items() for number in numbers[kv])


def _runs(pieces: Sequence[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for piece in sorted(pieces):
        if runs and runs[-1][1] == piece:
            runs[-1] = (runs[-1][0], piece + 1)
        else:
            runs.append((piece, piece + 1))
    return tuple(runs)
