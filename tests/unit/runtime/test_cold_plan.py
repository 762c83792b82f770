"""Plans of what a pass reads from flash: ranges of few chunks, each lane's pieces as runs."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from offload.kv_chunks import Chunk
from runtime.executor.program.cold_plan import ColdPlan, ColdRange, gaps, reads_of


class Cache:
    """Stands for a sequence: chunks of one layer."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self._chunks = chunks

    def chunks(self, layer: int) -> list[Chunk]:
        return self._chunks


@dataclass(frozen=True)
class OneLane:
    """Stands for a lane."""

    kv: Cache
    start: int


def chunk(*, cold: bool = True) -> Chunk:
    made = Chunk(1)
    made.memory = None if cold else object()  # type: ignore[assignment]
    return made


def test_lanes_of_a_sequence_and_shared_chunks_are_read_once() -> None:
    shared = [chunk() for _ in range(3)]
    one, other = Cache([*shared, chunk(cold=False), chunk()]), Cache([*shared, chunk(), chunk()])
    lanes = [OneLane(one, 2600), OneLane(one, 2561), OneLane(other, 2570)]
    reads = reads_of(0, None, lanes)
    assert len(reads) == 3 + 1 + 2
    plan = ColdPlan.of([reads, [], reads[:1]], lanes, 2)
    assert plan.layers[0] == (
        ColdRange(2, ((0, ((0, 2),)), (1, ((0, 2),)), (2, ((0, 2),)))),
        ColdRange(4, ((0, ((2, 3), (4, 5))), (1, ((2, 3), (4, 5))), (2, ((2, 3),)))),
        ColdRange(6, ((2, ((3, 5),)),)),
    )
    assert not plan.layers[1]
    assert plan.ends == [2, 4, 6, 7]
    assert plan.runs(0, 2) == [((0, 2),), ((2, 3),), ((3, 5),)]
    assert hash(plan) == hash(ColdPlan.of([reads, [], reads[:1]], lanes, 2))


def test_only_what_is_in_view_is_read() -> None:
    kv = Cache([chunk() for _ in range(5)])
    assert [read.places for read in reads_of(0, 600, [OneLane(kv, 2560)])] == [[(kv, 3)], [(kv, 4)]]


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 8))
@settings(max_examples=50)
def test_ranges_and_gaps_are_all_pieces(cold: list[bool], range_reads: int) -> None:
    kv = Cache([chunk(cold=is_cold) for is_cold in cold])
    lanes = [OneLane(kv, 512 * len(cold))]
    plan = ColdPlan.of([reads_of(0, None, lanes)], lanes, range_reads)
    runs = [run for of_range in plan.runs(0, 0) for run in of_range]
    assert sorted(runs) == runs
    assert [piece for first, end in runs for piece in range(first, end)] == [
        piece for piece, is_cold in enumerate(cold) if is_cold
    ]
    rest = [piece for first, end in gaps(runs) for piece in range(first, len(cold) if end is None else end)]
    assert rest == [piece for piece, is_cold in enumerate(cold) if not is_cold]
    counts = [end - before for before, end in zip([0, *plan.ends], plan.ends, strict=False)]
    assert all(count == range_reads for count in counts[:-1])
    assert sum(counts) == sum(cold)
