"""What lies in pairs in a file is in memory as it was."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offload.pairs import Pairs


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.integers(0, 30))
def test_pairs_are_put_together_and_taken_apart(count: int, first_bytes: int, second_bytes: int, behind: int) -> None:
    pairs = Pairs(count, first_bytes, second_bytes)
    memory = np.random.default_rng(count).integers(0, 256, count * pairs.pair_bytes + behind, np.uint8)
    file, back = np.zeros_like(memory), np.zeros_like(memory)
    pairs.put_together(memory, file)
    pairs.take_apart(file, back)
    assert np.array_equal(back, memory)
    for number in range(count):
        pair = file[number * pairs.pair_bytes :][: pairs.pair_bytes]
        assert np.array_equal(pair[:first_bytes], memory[number * first_bytes :][:first_bytes])
        assert np.array_equal(pair[first_bytes:], memory[pairs.seconds_start + number * second_bytes :][:second_bytes])
