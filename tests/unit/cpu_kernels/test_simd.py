"""The builder's operations, run on every ISA that this machine executes."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.compiler import kernel_address
from cpu_kernels.isa import ISA, Dot, current, runnable_isas
from cpu_kernels.simd import F32, I8, I16, I32, I64, Kernel, Value, vector_type

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
every_isa = pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)


def _run(name: str, isa: ISA, trace: Callable[[Kernel], None], *arrays: NDArray, end: int = 0) -> None:
    args = np.zeros(16, dtype=np.int64)
    args[: len(arrays)] = [array.ctypes.data for array in arrays]
    _FUNCTION(kernel_address(f"test_{name}", isa, trace))(args.ctypes.data, 0, end)


@every_isa
def test_every_half_becomes_the_same_float(isa: ISA) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, dtype=np.float32)

    def trace(kernel: Kernel) -> None:
        with kernel.loop(kernel.begin, kernel.end, kernel.lanes) as index:
            bits = kernel.load(vector_type(I16, kernel.lanes), kernel.arg(0) + index * 2)
            kernel.store(kernel.half_to_float(bits), kernel.arg(1) + index * 4)

    _run("halves", isa, trace, halves, out, end=1 << 16)
    expected = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(out, expected, equal_nan=True)
    assert np.array_equal(np.signbit(out), np.signbit(expected))


@every_isa
def test_dot_products_of_all_bytes(isa: ISA) -> None:
    """Every allowed weight with every activation but -128, which is never written."""
    signed = not isa.unsigned_bytes
    weights = np.arange(-128, 128, dtype=np.int8) if signed else np.arange(256, dtype=np.uint8)
    pairs = np.array([(w, x) for w in weights for x in range(-127, 128)], dtype=np.int16)
    pairs = pairs[: len(pairs) // (4 * isa.lanes) * 4 * isa.lanes]
    w, x = pairs[:, 0].astype(weights.dtype), pairs[:, 1].astype(np.int8)
    out = np.empty(len(pairs) // 4, dtype=np.int32)

    def trace(kernel: Kernel) -> None:
        multiply = kernel.dot_signed if signed else kernel.dot
        with kernel.loop(kernel.begin, kernel.end, 4 * kernel.lanes) as place:
            left, right = (kernel.load(kernel.bytes, kernel.arg(index) + place) for index in range(2))
            kernel.store(multiply(kernel.constant(kernel.ints, 7), left, right), kernel.arg(2) + place)

    _run("dots", isa, trace, w, x, out, end=len(pairs))
    assert np.array_equal(out, 7 + (w.astype(np.int32) * x).reshape(-1, 4).sum(axis=1))


def test_signed_weights_are_refused_where_they_would_be_read_as_unsigned() -> None:
    kernel = Kernel("refused", current())
    zero = kernel.constant(kernel.bytes, 0)
    if current().dot is not Dot.VPDPBUSD:
        pytest.skip("this machine has no vpdpbusd")
    with pytest.raises(TypeError, match="unsigned"):
        kernel.dot_signed(kernel.constant(kernel.ints, 0), zero, zero)


@every_isa
def test_byte_operations(isa: ISA) -> None:
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, isa.vector_bytes, dtype=np.uint8)
    table = rng.integers(-128, 128, 16)
    out = np.empty((3, isa.vector_bytes), dtype=np.uint8)

    def trace(kernel: Kernel) -> None:
        value = kernel.load(kernel.bytes, kernel.arg(0))
        found = kernel.look_up(kernel.byte_table([int(entry) for entry in table]), value & 15)
        results = (kernel.byte_shift(value, 4, 15), kernel.byte_shift(value, -2, 0x30), found)
        for index, result in enumerate(results):
            kernel.store(result, kernel.arg(1) + index * kernel.isa.vector_bytes)

    _run("bytes", isa, trace, data, out)
    assert np.array_equal(out[0], data >> 4)
    assert np.array_equal(out[1], data << 2 & 0x30)
    assert np.array_equal(out[2], table[data & 15].astype(np.uint8))


@every_isa
def test_rounding_and_lanes(isa: ISA) -> None:
    values = np.resize(np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3.49, -127.0, 4194303.0], dtype=np.float32), isa.lanes)
    rounded, numbers = np.empty(isa.lanes, dtype=np.int32), np.empty(3, dtype=np.float32)

    def trace(kernel: Kernel) -> None:
        value = kernel.load(kernel.floats, kernel.arg(0))
        kernel.store(kernel.round_to_int(value), kernel.arg(1))
        results = (kernel.max_lanes(value), kernel.sum_lanes(value * 2.0), kernel.unary_float("fabs", value.lane(3)))
        for index, result in enumerate(results):
            kernel.store(result, kernel.arg(2) + 4 * index)

    _run("rounding", isa, trace, values, rounded, numbers)
    assert np.array_equal(rounded, np.rint(values).astype(np.int32))
    assert numbers.tolist() == [values.max(), pytest.approx(2 * values.sum()), abs(values[3])]


def test_scalars() -> None:
    """Each operator against Python's."""
    x, y = 1000, 37
    out = np.zeros(20, dtype=np.int64)

    def results(a: Value, b: Value) -> list[Value]:
        kernel = a.kernel
        small = a.truncate(I32)
        return [
            *(a + b, a - b, a * b, a // b, a % b, a & b, a | b, a ^ b, a << 3, a >> 2, -a, 5 - a, (-a).sar(2)),
            kernel.select(a > b, a, b),
            kernel.minimum(a, b),
            kernel.select(a.equals(x), kernel.int64(1), kernel.int64(0)),
            small.to_float().to_int(I64),
            small.extend(I64, signed=True),
            (small.to_float() / 8.0).to_int(I64),
            (1.0 / kernel.constant(F32, 0.25)).to_int(I64),
        ]

    def trace(kernel: Kernel) -> None:
        for index, value in enumerate(results(kernel.arg(0), kernel.arg(1))):
            kernel.store(value, kernel.arg(2) + 8 * index)

    args = np.array([x, y, out.ctypes.data, *[0] * 13])
    _FUNCTION(kernel_address("test_scalars", current(), trace))(args.ctypes.data, 0, 0)
    expected = [x + y, x - y, x * y, x // y, x % y, x & y, x | y, x ^ y, x << 3, x >> 2, -x, 5 - x, -x >> 2]
    assert out.tolist() == [*expected, x, y, 1, x, x, 125, 4]


def test_mistakes_are_found_while_building() -> None:
    kernel = Kernel("mistakes", current())
    with pytest.raises(ValueError, match="16 entries"):
        kernel.arg(16)
    with pytest.raises(TypeError, match="not defined"):
        kernel.constant(kernel.floats, 1.0) & 3
    assert kernel.table(I8, [1, 2]).type == vector_type(I8, 2)
