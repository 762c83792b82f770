"""The op table: rows, parameters, patches and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.native import float_bits
from cpu_kernels.program import (
    FIRST_ARGUMENT,
    LINE_BYTES,
    MAX_CHUNKS,
    Kind,
    Parameter,
    Program,
    Row,
    aligned_int64,
    divided,
    less,
    times,
)


def test_rows_become_a_table() -> None:
    program = Program([Row("a", 1000, 7, (1, -2), chunk=3), Row("b", 0, 1, (5, 6), kind=Kind.WAIT)])
    table = program.table()
    assert table.shape == (2, 20)
    assert table[0, :6].tolist() == [1000, 7, 3, 0, 1, -2]
    assert table[1, :6].tolist() == [0, 1, 0, 1, 5, 6]
    assert not table[:, 6:].any()
    assert table.ctypes.data % LINE_BYTES == 0
    assert program.names == ("a", "b")
    assert len(program) == 2


def test_parameters_are_set_wherever_they_are_used() -> None:
    tokens = Parameter("tokens")
    program = Program([Row("a", 1, tokens, (tokens, 9)), Row("b", 1, times(divided(tokens, 4), 3), (tokens,))])
    program.add(Row("c", 1, 1, (Parameter("start", offset=1, divisor=512, factor=2),)))
    assert program.parameters == {"tokens", "start"}
    with pytest.raises(ValueError, match="no value for start, tokens"):
        program.table()
    program.set_all(tokens=5, start=511)
    table = program.table()
    assert table[0, [1, 4, 5]].tolist() == [5, 5, 9]
    assert table[1, [1, 4]].tolist() == [6, 5]
    assert table[2, 4] == 2
    program.set("start", 512)
    assert program.table() is table, "the table keeps its address"
    assert table[2, 4] == 4
    with pytest.raises(KeyError):
        program.set("end", 1)
    with pytest.raises(ValueError, match="cannot be divided"):
        divided(times(tokens, 2), 4)
    with pytest.raises(ValueError, match="cannot be lessened"):
        less(times(tokens, 2), 1)
    assert less(7, 3) == 4
    assert times(less(divided(tokens, 4), 2), 3).of(17) == 3 * (5 - 2)


def test_values_survive_further_rows() -> None:
    program = Program([Row("a", 1, Parameter("tokens"), (7,))])
    program.set("tokens", 3)
    program.patch(0, 0, 8)
    program.add(Row("b", 1, 2))
    assert program.table()[:, [1, FIRST_ARGUMENT]].tolist() == [[3, 8], [2, 0]]
    program.add(Row("c", 1, Parameter("tokens")))
    with pytest.raises(ValueError, match="no value for tokens"):
        program.table()
    program.set("tokens", 4)
    assert program.table()[:, 1].tolist() == [4, 2, 4]


@given(st.integers(0, 10**6), st.integers(1, 100), st.integers(0, 100), st.integers(1, 600))
def test_parameter_rounds_up(value: int, factor: int, offset: int, divisor: int) -> None:
    assert Parameter("n", factor, offset, divisor).of(value) == int(np.ceil((value + offset) / divisor)) * factor


def test_patches() -> None:
    program = Program([Row("a", 1, 5, (1, 2), chunk=2)])
    program.patch(0, 1, 77)
    program.patch_items(0, 9)
    assert program.table()[0, [1, 5]].tolist() == [9, 77]
    with pytest.raises(ValueError, match="argument 16"):
        program.patch(0, 16, 0)
    with pytest.raises(ValueError, match="-1 items"):
        program.patch_items(0, -1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="17 arguments, a row holds 16"):
        Program([Row("a", 1, 1, tuple(range(17)))])
    with pytest.raises(ValueError, match="chunks of -1"):
        Program([Row("a", 1, 1, chunk=-1)])
    with pytest.raises(ValueError, match="in chunks of 1"):
        Program([Row("a", 1, MAX_CHUNKS, chunk=1)])


def test_floats_travel_as_bits() -> None:
    assert np.array([float_bits(1.5)], np.int64).astype(np.int32).view(np.float32)[0] == 1.5
    assert float_bits(-0.0) == -(1 << 31)


def test_alignment() -> None:
    for count in (1, 5, 100):
        block = aligned_int64(count)
        assert block.shape == (count,)
        assert block.ctypes.data % LINE_BYTES == 0
        assert not block.any()
