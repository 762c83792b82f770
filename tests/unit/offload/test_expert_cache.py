"""The cache of streamed weights under any order of use: what a step needs is there or on its way, and right."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.expert_slots import ExpertSlots
from cpu_kernels.waiting import wait_for_counter
from offload.errors import FlashError
from offload.expert_cache import ExpertCache, Piece
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
    """Two parts an expert, of a piece each."""

    def pieces(self, layer: int, expert: int) -> list[Piece]:
        begin = (layer * EXPERTS + expert) * SLOT

        def piece(part: int) -> Piece:
            def unpack(data: np.ndarray, slot: np.ndarray) -> None:
                slot[part * PART : (part + 1) * PART] = data

            return Piece(part, Extent(0, begin + part * PART, PART), unpack)

        return [piece(0), piece(1)]


class Walk:
    """Uses a cache as a program does: layer after layer, waiting for what it uses."""

    def __init__(self, source: ByteSource, slots: int, policy: PolicyName) -> None:
        self.tables = ExpertSlots(LAYERS, EXPERTS, 2, slots=slots, slot_bytes=SLOT)
        reader = FlashReader([source], most_bytes=PART, mode=ReadMode.BUFFERED, depth=2)
        self.cache = ExpertCache(self.tables, Bundles(), reader, policy=policy)

    def use(self, layer: int, experts: list[int]) -> None:
        tables = self.tables
        tables.clock[0] += 1
        tables.clock[1] += len(experts)
        tables.last_used[layer, experts] = tables.clock[0]
        tables.counts[layer, experts] += 1
        missing = [expert for expert in experts if not self.place(layer, 0, expert)[1]]
        if missing or len(experts) >= self.cache.dense_from:
            self.cache.fetch(layer, np.array(missing, np.int64), len(experts))
        for expert in experts:
            for part in range(2):
                distance, counter, target = self.place(layer, part, expert)
                assert counter, "what is used has a slot"
                assert wait_for_counter(tables.settings_address, counter, target) == 0
                begin = distance + part * PART
                assert (self.memory[begin : begin + PART] == 1 + layer * EXPERTS + expert).all()

    def place(self, layer: int, part: int, expert: int) -> tuple[int, int, int]:
        """(distance, counter, target) as a program finds them."""
        distance, counter, target, _ = self.tables._places[layer, part, expert].tolist()
        return distance, counter, target

    @property
    def memory(self) -> np.ndarray:
        return self.cache._memory


steps = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(steps=steps, slots=st.integers(EXPERTS, LAYERS * EXPERTS), policy=st.sampled_from(list(PolicyName)))
def test_what_is_used_is_there_and_right(
    source: ByteSource, steps: list[set[int]], slots: int, policy: PolicyName
) -> None:
    walk = Walk(source, slots, policy)
    with walk.cache:
        for number, experts in enumerate(steps):
            walk.use(number % LAYERS, sorted(experts))
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
            walk.use(number % LAYERS, sorted(experts))


def test_a_step_that_needs_more_than_there_are_slots_is_refused(source: ByteSource) -> None:
    walk = Walk(source, 2, PolicyName.LRU)
    with walk.cache, pytest.raises(FlashError, match="2 slots are too few for a step that needs 1 more"):
        walk.use(0, [0, 1, 2])


def test_bytes_are_counted(source: ByteSource) -> None:
    walk = Walk(source, LAYERS * EXPERTS, PolicyName.LRU)
    with walk.cache:
        walk.use(0, [0, 1])
        before = walk.cache.counts
        walk.use(1, [2])
        found = walk.cache.counts.since(before)
        assert (found.lookups, found.misses, found.bytes_read, found.hit_rate) == (1, 1, SLOT, 0.0)
        assert walk.cache.counts.waiting_s > 0
