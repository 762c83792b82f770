"""The cache of streamed weights under any order of use: what a step needs is there or on its way, and right."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.expert_slots import ExpertSlots
from cpu_kernels.waiting import wait_for_counter
from offload.errors import FlashError
from offload.expert_cache import ExpertCache
from offload.expert_load import Piece
from offload.flash import Extent, FlashReader, ReadMode
from offload.gguf_source import ByteSource
from offload.policies import PolicyName

LAYERS, EXPERTS, SLOT = 3, 5, 4096
PART = SLOT // 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByteSource]:
    """A file in which each expert's bytes tell whose they are."""
    path = tmp_path_factory.mktemp("experts") / "experts.bin"
    path.write_bytes(b"".join(bytes([1 + index]) * SLOT for index in range(LAYERS * EXPERTS)))
    file = ByteSource(path)
    yield file
    file.close()


class Bundles:
    """Two parts an expert, of a piece each, that take `pause_s`; what `failing` holds cannot be used so many times."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.failing: Counter[tuple[int, int, int]] = Counter()

    def pieces(self, layer: int, expert: int) -> list[Piece]:
        begin = (layer * EXPERTS + expert) * SLOT

        def piece(part: int) -> Piece:
            def unpack(data: np.ndarray, slot: np.ndarray) -> None:
                time.sleep(self.pause_s)
                if self.failing[layer, expert, part] > 0:
                    self.failing[layer, expert, part] -= 1
                    raise FlashError("injected")
                slot[part * PART : (part + 1) * PART] = data

            return Piece(part, Extent(0, begin + part * PART, PART), unpack)

        return [piece(0), piece(1)]


class Walk:
    """Uses a cache as a program does: layer after layer, waiting for what it uses."""

    def __init__(self, source: ByteSource, slots: int, policy: PolicyName, pause_s: float = 0.0) -> None:
        self.tables = ExpertSlots(LAYERS, EXPERTS, 2, slots=slots, slot_bytes=SLOT)
        reader = FlashReader([source], most_bytes=PART, mode=ReadMode.BUFFERED, depth=2)
        self.bundles = Bundles(pause_s)
        self.cache = ExpertCache(self.tables, self.bundles, reader, policy=policy)

    def use(self, layer: int, experts: list[int], guess: Sequence[int] = ()) -> bool:
        """Looks experts up, guesses some of the next layer's, waits for what is used; whether all of it came."""
        tables = self.tables
        tables.clock[0] += 1
        tables.clock[1] += len(experts)
        tables.last_used[layer, experts] = tables.clock[0]
        tables.counts[layer, experts] += 1
        missing = self.absent(layer, experts)
        if missing or len(experts) >= self.cache.dense_from or tables.tells[layer]:
            self.cache.fetch(layer, np.array(missing, np.int64), len(experts))
        following = layer + 1
        if following < LAYERS and (absent := self.absent(following, guess)):
            self.cache.foresee(following, np.array(absent, np.int64), layer)
        return all(self.has_come(layer, expert, part) for expert in experts for part in range(2))

    def has_come(self, layer: int, expert: int, part: int) -> bool:
        """Waits for a part of an expert that is used."""
        distance, counter, target = self.place(layer, part, expert)
        assert counter, "what is used has a slot"
        if wait_for_counter(self.tables.settings_address, counter, target) != 0:
            return False
        begin = distance + part * PART
        assert (self.cache._memory[begin : begin + PART] == 1 + layer * EXPERTS + expert).all()
        return True

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of them that have no slot."""
        return [expert for expert in experts if not self.place(layer, 0, expert)[1]]

    def place(self, layer: int, part: int, expert: int) -> tuple[int, int, int]:
        """(distance, counter, target) as a program finds them."""
        distance, counter, target, _ = self.tables._places[layer, part, expert].tolist()
        return distance, counter, target

    def check(self) -> None:
        """When nothing is read any more: no slot has two owners, and none is lost."""
        self.cache.reader.drain()
        owners = [
            self.place(layer, 0, expert)[0] // SLOT
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
            if self.place(layer, 0, expert)[1]
        ]
        residents = self.cache._residents
        assert sorted(owners + residents._free) == list(range(self.tables.slots))


some_experts = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS)
steps = st.lists(some_experts, min_size=1, max_size=30)
guessed_steps = st.lists(st.tuples(some_experts, st.permutations(range(EXPERTS))), min_size=1, max_size=30)
some_pieces = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1), st.integers(0, 1))


@settings(max_examples=60, deadline=None)
@given(steps=steps, slots=st.integers(EXPERTS, LAYERS * EXPERTS), policy=st.sampled_from(list(PolicyName)))
def test_what_is_used_is_there_and_right(
    source: ByteSource, steps: list[set[int]], slots: int, policy: PolicyName
) -> None:
    walk = Walk(source, slots, policy)
    with walk.cache:
        for number, experts in enumerate(steps):
            assert walk.use(number % LAYERS, sorted(experts))
        counts = walk.cache.counts
        assert counts.lookups == sum(map(len, steps))
        assert counts.misses + counts.read_ahead >= len(
            {(number % LAYERS, expert) for number, experts in enumerate(steps) for expert in experts}
        )
        if slots == LAYERS * EXPERTS:
            assert counts.misses + counts.read_ahead <= slots, "nothing is read twice"


@settings(max_examples=30, deadline=None)
@given(steps=steps, sizes=st.lists(st.integers(EXPERTS, LAYERS * EXPERTS), min_size=1, max_size=5))
def test_it_may_shrink_and_grow_between_steps(source: ByteSource, steps: list[set[int]], sizes: list[int]) -> None:
    walk = Walk(source, LAYERS * EXPERTS, PolicyName.LEAST_STALE)
    with walk.cache:
        for number, experts in enumerate(steps):
            walk.cache.resize(sizes[number % len(sizes)])
            assert walk.use(number % LAYERS, sorted(experts))


@settings(max_examples=80, deadline=None)
@given(
    steps=guessed_steps,
    slots=st.integers(EXPERTS, LAYERS * EXPERTS),
    policy=st.sampled_from(list(PolicyName)),
    sizes=st.lists(st.integers(EXPERTS, LAYERS * EXPERTS), max_size=3),
    pause_s=st.sampled_from([0.0, 1e-4, 5e-4]),
)
def test_guesses_change_nothing_but_when_reads_begin(
    source: ByteSource,
    steps: list[tuple[set[int], list[int]]],
    slots: int,
    policy: PolicyName,
    sizes: list[int],
    pause_s: float,
) -> None:
    walk = Walk(source, slots, policy, pause_s)
    with walk.cache:
        for number, (experts, guess) in enumerate(steps):
            layer = number % LAYERS
            if sizes and layer == 0:
                walk.cache.resize(min(sizes[number % len(sizes)], slots))
            assert walk.use(layer, sorted(experts), guess)
        if sizes:
            walk.cache.resize(slots)
        walk.check()
        counts = walk.cache.counts
        assert counts.lookups == sum(len(experts) for experts, _ in steps)
        assert 0 <= counts.foreseen_used <= counts.foreseen
        assert counts.wasted_bytes <= (counts.foreseen - counts.foreseen_used) * SLOT
        assert counts.wasted_bytes <= counts.bytes_read
        assert 0.0 <= counts.hit_rate <= 1.0
        assert 0.0 <= counts.foreseen_recall <= 1.0


@settings(max_examples=80, deadline=None)
@given(
    steps=guessed_steps,
    slots=st.integers(EXPERTS, LAYERS * EXPERTS),
    failing=st.dictionaries(some_pieces, st.integers(1, 3), max_size=8),
    pause_s=st.sampled_from([0.0, 2e-4]),
)
def test_reads_that_fail_end_only_steps_that_wait_for_them(
    source: ByteSource,
    steps: list[tuple[set[int], list[int]]],
    slots: int,
    failing: dict[tuple[int, int, int], int],
    pause_s: float,
) -> None:
    walk = Walk(source, slots, PolicyName.LRU, pause_s)
    walk.bundles.failing.update(failing)
    with walk.cache:
        for number, (experts, guess) in enumerate(steps):
            layer = number % LAYERS
            while not walk.use(layer, sorted(experts), guess):
                assert any(walk.bundles.failing[layer, expert, part] >= 0 for expert in experts for part in range(2))
                assert isinstance(walk.cache.recover(), FlashError)
        walk.cache.reader.drain()
        assert walk.cache.recover() is None
        walk.check()


def test_a_right_guess_is_no_miss_and_a_wrong_one_is_wasted(source: ByteSource) -> None:
    walk = Walk(source, LAYERS * EXPERTS, PolicyName.LRU)
    with walk.cache:
        walk.use(0, [0], guess=[3, 1])
        walk.cache.reader.drain()
        walk.use(1, [3])
        counts = walk.cache.counts
        assert (counts.foreseen, counts.foreseen_used, counts.misses) == (2, 1, 1)
        assert counts.wasted_bytes == SLOT
        assert (counts.hit_rate, counts.foreseen_recall) == (0.0, 0.5)
        walk.use(2, [0])
        walk.use(0, [0])
        walk.use(1, [1])
        assert walk.cache.counts.misses == 2, "what was guessed too early is there"


def test_a_guess_does_not_displace_what_the_step_or_the_next_one_needs(source: ByteSource) -> None:
    walk = Walk(source, EXPERTS + 1, PolicyName.LRU)
    with walk.cache:
        walk.use(1, [0, 1])
        walk.use(0, [0, 1, 2, 3], guess=[2, 3, 4])
        walk.cache.reader.drain()
        assert not walk.absent(0, [0, 1, 2, 3])
        assert walk.cache.counts.foreseen <= 1, "slots for a whole layer are left"


def test_a_step_that_needs_more_than_there_are_slots_is_refused(source: ByteSource) -> None:
    walk = Walk(source, 2, PolicyName.LRU)
    with walk.cache, pytest.raises(FlashError, match="2 slots are too few for a step that needs 1 more"):
        walk.use(0, [0, 1, 2])


def test_a_slot_whose_last_part_nobody_waits_for_is_waited_for(source: ByteSource) -> None:
    walk = Walk(source, 1, PolicyName.LRU, pause_s=0.05)
    with walk.cache:
        walk.cache.fetch(0, np.array([3]), 1)
        assert walk.has_come(0, 3, 0)
        assert walk.use(1, [2])
        walk.check()


def test_bytes_are_counted(source: ByteSource) -> None:
    walk = Walk(source, LAYERS * EXPERTS, PolicyName.LRU)
    with walk.cache:
        walk.use(0, [0, 1])
        before = walk.cache.counts
        walk.use(1, [2])
        found = walk.cache.counts.since(before)
        assert (found.lookups, found.misses, found.bytes_read, found.hit_rate) == (1, 1, SLOT, 0.0)
        assert walk.cache.counts.waiting_s > 0
