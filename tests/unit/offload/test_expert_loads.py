"""Reads that bring experts, one by one: guesses that are dropped while they are read, failures, who waits for what."""

from collections import deque

import numpy as np
import pytest

from cpu_kernels.expert_slots import ExpertSlots
from cpu_kernels.waiting import wait_for_counter
from offload.errors import FlashError, StrataError
from offload.expert_load import Load, Piece
from offload.expert_loads import FAILED, ExpertLoads
from offload.flash import Extent, Priority, Read
from offload.policies import PolicyName, Uses, make_policy
from offload.residents import Residents

LAYERS, EXPERTS, SLOTS, PART = 2, 4, 5, 64
ERROR = FlashError("the drive is on fire")


class ByHand:
    """A reader whose reads begin and end when a test says so."""

    def __init__(self) -> None:
        self.waiting: deque[Read] = deque()

    def submit_all(self, reads: list[Read]) -> None:
        self.waiting.extend(reads)

    def cancel(self, read: Read) -> bool:
        if read not in self.waiting:
            return False
        self.waiting.remove(read)
        return True

    def hurry(self, read: Read) -> None:
        read.priority = Priority.DEMAND

    def begin(self) -> Read:
        return self.waiting.popleft()

    def bring(self, read: Read | None = None) -> None:
        read = read or self.begin()
        read.consume(np.full(read.extent.num_bytes, read.extent.offset + 1, np.uint8))

    def fail(self, read: Read | None = None, error: StrataError = ERROR) -> None:
        (read or self.begin()).failed(error)


class Bundles:
    """Two parts of a piece each; the bytes tell the expert."""

    def pieces(self, layer: int, expert: int) -> list[Piece]:
        def unpack_to(part: int) -> Piece:
            def unpack(data: np.ndarray, slot: np.ndarray) -> None:
                slot[part * PART : (part + 1) * PART] = data

            return Piece(part, Extent(0, layer * EXPERTS + expert, PART), unpack)

        return [unpack_to(0), unpack_to(1)]


class Bench:
    """Loads with everything they need."""

    def __init__(self) -> None:
        self.slots = ExpertSlots(LAYERS, EXPERTS, 2, slots=SLOTS, slot_bytes=2 * PART)
        uses = Uses(self.slots.clock[:1], self.slots.last_used, self.slots.counts)
        self.residents = Residents(self.slots, make_policy(PolicyName.LRU, uses))
        self.reader = ByHand()
        self.memory = np.zeros(SLOTS * 2 * PART, np.uint8)
        self.loads = ExpertLoads(self.slots, self.residents, Bundles(), self.reader, self.memory)  # type: ignore[arg-type]

    def begin(self, layer: int, experts: list[int], priority: Priority) -> list[Load]:
        slots = self.residents.take(len(experts), layer, 0)
        return self.loads.begin(layer, experts, slots, priority)

    def look_up(self, layer: int, *experts: int) -> None:
        flags = np.zeros(EXPERTS, bool)
        flags[list(experts)] = True
        self.loads.looked_up(layer, flags)

    def code(self, layer: int, expert: int, part: int) -> int:
        """What a program that needs the part gets: 0 when it is there; it must not have to wait."""
        _, counter, target, _ = self.slots._places[layer, part, expert].tolist()
        assert counter, "it has a slot"
        return wait_for_counter(self.slots.settings_address, counter, target)

    def is_there(self, layer: int, expert: int) -> bool:
        """Whether the whole expert is in a slot, and right."""
        if not self.slots._places[layer, 0, expert, 1]:
            return False
        assert [self.code(layer, expert, part) for part in range(2)] == [0, 0]
        begin = int(self.slots._places[layer, 0, expert, 0])
        assert (self.memory[begin : begin + 2 * PART] == layer * EXPERTS + expert + 1).all()
        return True

    @property
    def tells(self) -> list[int]:
        return list(map(int, self.slots.tells))


def test_first_parts_come_first_and_what_is_there_may_be_waited_for() -> None:
    bench = Bench()
    bench.begin(0, [1, 3], Priority.DEMAND)
    assert [read.extent.offset for read in bench.reader.waiting] == [1, 3, 1, 3]
    bench.reader.bring()
    assert bench.code(0, 1, 0) == 0
    assert bench.residents.num_arriving == 2
    for _ in range(3):
        bench.reader.bring()
    assert bench.is_there(0, 1)
    assert bench.is_there(0, 3)
    assert bench.residents.num_arriving == 0
    assert bench.loads.bytes_read == 4 * PART
    assert bench.tells == [0, 0]


def test_a_guess_that_is_wrong_and_had_not_begun_gives_its_slot_back() -> None:
    bench = Bench()
    (load,) = bench.begin(1, [2], Priority.PREFETCH)
    assert bench.tells == [0, 1]
    bench.look_up(1, 0)
    assert not bench.reader.waiting
    assert (load.num_bytes, bench.residents.num_free) == (0, SLOTS)
    assert bench.tells == [0, 0]
    assert not bench.is_there(1, 2)


def test_the_slot_of_a_dropped_guess_is_taken_only_when_its_last_read_has_ended() -> None:
    bench = Bench()
    (load,) = bench.begin(1, [2], Priority.PREFETCH)
    running = bench.reader.begin()
    bench.look_up(1, 0)
    assert load.num_bytes == PART, "one of two was cancelled"
    assert bench.residents.num_free == SLOTS - 1
    others = bench.begin(1, [0, 1, 2, 3], Priority.DEMAND)
    assert load.slot not in [other.slot for other in others]
    bench.reader.bring(running)
    assert bench.residents.num_free == 1
    for _ in range(8):
        bench.reader.bring()
    assert all(bench.is_there(1, expert) for expert in range(4))
    (again,) = bench.begin(0, [0], Priority.DEMAND)
    assert again.slot == load.slot
    bench.reader.bring()
    bench.reader.bring()
    assert bench.is_there(0, 0)


def test_a_wrong_guess_that_is_being_read_stays_and_may_come_true_later() -> None:
    bench = Bench()
    (load,) = bench.begin(1, [2], Priority.PREFETCH)
    first, second = bench.reader.begin(), bench.reader.begin()
    bench.look_up(1, 0)
    assert bench.tells == [0, 1], "it may still fail"
    bench.reader.bring(first)
    bench.look_up(1, 2)
    assert load.is_demanded
    bench.reader.bring(second)
    assert bench.is_there(1, 2)
    assert load.reads == []


def test_a_guess_that_comes_true_is_hurried() -> None:
    bench = Bench()
    bench.begin(1, [2, 3], Priority.PREFETCH)
    bench.look_up(1, 2)
    assert [(read.extent.offset, read.priority) for read in bench.reader.waiting] == [
        (EXPERTS + 2, Priority.DEMAND),
        (EXPERTS + 2, Priority.DEMAND),
    ]
    bench.reader.bring()
    bench.reader.bring()
    assert bench.is_there(1, 2)
    assert bench.loads.waiting_s > 0


def test_a_failed_guess_is_read_again_when_it_is_needed() -> None:
    bench = Bench()
    bench.begin(1, [2], Priority.PREFETCH)
    bench.reader.fail()
    bench.reader.bring()
    assert bench.tells == [0, 1]
    bench.look_up(1, 2)
    assert [read.priority for read in bench.reader.waiting] == [Priority.DEMAND]
    bench.reader.bring()
    assert bench.is_there(1, 2)
    assert bench.loads.forget() is None


def test_a_guess_that_fails_after_it_came_true_is_read_once_more_and_then_ends_the_step() -> None:
    bench = Bench()
    bench.begin(1, [2], Priority.PREFETCH)
    running = bench.reader.begin()
    bench.look_up(1, 2)
    bench.reader.fail(running)
    assert [read.priority for read in bench.reader.waiting] == [Priority.DEMAND] * 2
    bench.reader.bring()
    bench.reader.fail()
    assert [bench.code(1, 2, part) for part in range(2)].count(FAILED) == 1
    assert bench.loads.forget() is ERROR
    assert bench.loads.forget() is None
    assert bench.residents.num_free == SLOTS


@pytest.mark.parametrize("priority", [Priority.PREFETCH, Priority.AHEAD])
def test_what_failed_and_is_not_needed_gives_its_slot_back(priority: Priority) -> None:
    bench = Bench()
    bench.begin(1, [2], priority)
    bench.reader.fail()
    bench.reader.bring()
    bench.look_up(1, 0)
    assert bench.residents.num_free == SLOTS
    assert bench.tells == [0, 0]


def test_a_guess_may_fail_after_it_was_dropped() -> None:
    bench = Bench()
    bench.begin(1, [2], Priority.PREFETCH)
    running = bench.reader.begin()
    bench.look_up(1)
    bench.reader.fail(running)
    assert bench.residents.num_free == SLOTS
    assert bench.loads.forget() is None


def test_what_is_read_ahead_is_kept_though_a_step_does_not_use_it() -> None:
    bench = Bench()
    bench.begin(1, [1, 2], Priority.AHEAD)
    bench.look_up(1, 1)
    assert [read.priority for read in bench.reader.waiting] == [Priority.DEMAND, Priority.AHEAD] * 2
    assert bench.tells == [0, 1]
    for _ in range(4):
        bench.reader.bring()
    assert bench.is_there(1, 1)
    assert bench.is_there(1, 2)


def test_a_demanded_read_that_fails_ends_the_step_and_can_be_asked_for_again() -> None:
    bench = Bench()
    bench.begin(0, [1], Priority.DEMAND)
    bench.reader.fail()
    bench.reader.bring()
    assert bench.code(0, 1, 0) == FAILED
    assert bench.loads.forget() is ERROR
    bench.begin(0, [1], Priority.DEMAND)
    bench.reader.bring()
    bench.reader.bring()
    assert bench.is_there(0, 1)
