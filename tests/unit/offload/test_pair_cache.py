"""The cache of pairs keeps what is used most, one pair in a place, and nothing of a slot that is gone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.pair_cache import PairCache
from offload.pairs import Pairs
from offload.spilled_pairs import PairedSlot

PAIRS = 8
PAIR_BYTES = 64


def slot(number: int) -> PairedSlot:
    return PairedSlot(number, 0, Pairs(PAIRS, 32, 32), np.empty(0, np.uint64))


def cache_of(entries: int, most: int = 1000) -> PairCache:
    cache = PairCache(PAIRS, PAIR_BYTES, most * PAIR_BYTES)
    cache.begin(entries * PAIR_BYTES)
    return cache


def only(*pairs: int) -> np.ndarray:
    wanted = np.zeros((1, PAIRS), bool)
    wanted[0, list(pairs)] = True
    return wanted


def test_what_was_put_is_found_there() -> None:
    cache, one = cache_of(4), slot(0)
    found, room = cache.take([one], only(1, 3))
    assert not found.any()
    assert np.flatnonzero(room[0]).tolist() == [1, 3]
    again, more = cache.take([one], only(1, 3, 4))
    assert again[0, [1, 3]].tolist() == room[0, [1, 3]].tolist()
    assert np.flatnonzero(more[0]).tolist() == [4]
    assert (cache.hits, cache.misses) == (2, 3)


def test_what_is_used_most_stays() -> None:
    cache, one = cache_of(2), slot(0)
    for turn in range(40):
        cache.begin(2 * PAIR_BYTES)
        found, _ = cache.take([one], only(0, 1, 2 + turn % 6))
        if turn:
            assert np.flatnonzero(found[0]).tolist() == [0, 1], "what comes once does not drive them out"


def test_uses_of_long_ago_count_little() -> None:
    cache, one, other = cache_of(1), slot(0), slot(1)
    for _ in range(20):
        cache.begin(PAIR_BYTES)
        cache.take([one], only(0))
    for _ in range(30):
        cache.begin(PAIR_BYTES)
        found, _ = cache.take([other], only(5))
    assert found[0, 5]


def test_of_a_slot_that_is_another_nothing_is_known() -> None:
    cache = cache_of(4)
    cache.take([slot(0)], only(1))
    found, room = cache.take([slot(0)], only(1))
    assert not found.any()
    assert room[0, 1]


def test_nothing_is_found_once_all_is_forgotten() -> None:
    cache, one = cache_of(4), slot(0)
    cache.take([one], only(1))
    cache.forget()
    assert not cache.take([one], only(1))[0].any()


def test_no_room_keeps_nothing() -> None:
    cache, one = cache_of(0), slot(3)
    for _ in range(2):
        found, room = cache.take([one], only(1, 2))
        assert not found.any()
        assert not room.any()


def test_memory_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(MemoryError):
        PairCache(PAIRS, PAIR_BYTES, 1 << 60)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(1, 255)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_every_place_holds_the_pair_that_was_put_there_last(turns: list[tuple[int, int, int]]) -> None:
    cache, slots = cache_of(0), [slot(number) for number in range(6)]
    held: dict[int, tuple[int, int]] = {}  # by address
    for entries, first, bits in turns:
        cache.begin(entries * PAIR_BYTES)
        at = [first, (first + 1) % 6]
        wanted = np.array([[bool(bits >> pair & 1) for pair in range(PAIRS)], [pair == first for pair in range(PAIRS)]])
        found, room = cache.take([slots[number] for number in at], wanted)
        assert not ((found != 0) & (room != 0)).any()
        assert not ((found != 0) | (room != 0))[~wanted].any()
        for row, pair in np.argwhere(found):
            assert held[int(found[row, pair])] == (at[row], pair)
        taken = {int(address) for address in found[found != 0]}
        for row, pair in np.argwhere(room):
            assert int(room[row, pair]) not in taken, "what is needed now is not driven out"
            taken.add(int(room[row, pair]))
            held[int(room[row, pair])] = (at[row], pair)
        assert len(taken) == np.count_nonzero(found) + np.count_nonzero(room) <= entries
        assert cache.num_bytes == entries * PAIR_BYTES
