"""Operations written over `simd`: their addresses for an ISA, and the mathematics that several of them share.

Knows nothing about what operations are for. All functions here take scalars and vectors alike.
"""

from collections.abc import Callable
from typing import Any

from cpu_kernels import isa as ladder
from cpu_kernels.compiler import Trace, kernel_address
from cpu_kernels.isa import ISA
from cpu_kernels.simd import F16, F32, I16, I32, Kernel, Value, is_vector, vector_type

LOG2_E = 1.4426950408889634
# ln 2 in two parts: the first has so few digits that its product with an exponent is exact (Cody and Waite)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# exp(r) = 1 + r + r^2 p(r) on |r| <= ln(2)/2, minimax as in Moshier's Cephes, expf
EXP_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
EXP_LOWEST, EXP_HIGHEST = -87.0, 88.0
GELU_SLOPE, GELU_CUBIC = 0.7978845608028654, 0.044715  # sqrt(2/pi); arXiv:1606.08415


class TracedOperation:
    """An operation of the program's ABI that is written by `trace`, compiled for an ISA when first asked for."""

    def __init__(self, name: str, trace: Trace) -> None:
        self.name = name
        self._trace = trace

    @property
    def address(self) -> int:
        """The machine code for the ISA in use."""
        return self.address_for(None)

    def address_for(self, isa: ISA | None) -> int:
        """The machine code for an ISA; None: the one in use."""
        return kernel_address(self.name, isa or ladder.current(), self._trace)


def each(k: Kernel, count: Value, body: Callable[[Value, Any], None]) -> None:
    """Calls body(offset in bytes, type) for every vector of `count` float32, then for every number that is left."""
    whole = count & -k.lanes
    with k.loop(0, whole, k.lanes) as index:
        body(index * 4, k.floats)
    with k.loop(whole, count) as index:
        body(index * 4, F32)


def spread(k: Kernel, value: Value, kind: Any) -> Value:
    """A scalar as a value of that type."""
    return k.splat(value, kind.count) if is_vector(kind) else value


def exp(k: Kernel, x: Value) -> Value:
    """e^x within 2 units in the last place, exactly 1 at 0; arguments are clamped to -87..88."""
    x = k.minimum(k.maximum(x, k.constant(x.type, EXP_LOWEST)), k.constant(x.type, EXP_HIGHEST))
    exponent = k.round_to_int(x * LOG2_E)
    turns = exponent.to_float()
    rest = k.fma(turns, k.constant(x.type, -LN2_HIGH), x)
    rest = k.fma(turns, k.constant(x.type, -LN2_LOW), rest)
    sum_ = k.constant(x.type, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        sum_ = k.fma(sum_, rest, k.constant(x.type, term))
    sum_ = k.fma(sum_, rest * rest, rest) + 1.0
    return sum_ * ((exponent + 127) << 23).bitcast(x.type)


def sigmoid(k: Kernel, x: Value) -> Value:
    """1 / (1 + e^-x)."""
    return 1.0 / (exp(k, -x) + 1.0)


def tanh(k: Kernel, x: Value) -> Value:
    """The hyperbolic tangent, by its exponential: absolute error below 2e-7."""
    return 1.0 - 2.0 / (exp(k, x * 2.0) + 1.0)


def silu(k: Kernel, x: Value) -> Value:
    """x * sigmoid(x)."""
    return x / (exp(k, -x) + 1.0)


def gelu(k: Kernel, x: Value) -> Value:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which is x sigmoid of twice the tanh's argument."""
    inner = k.fma(x * x * GELU_CUBIC, x, x)
    return x / (exp(k, inner * (-2.0 * GELU_SLOPE)) + 1.0)


def float_to_half(k: Kernel, x: Value) -> Value:
    """float32 as the bits of float16 (int16), to nearest, ties to even; too large becomes infinity."""
    count = x.type.count if is_vector(x.type) else 0

    def typed(element: Any) -> Any:
        return vector_type(element, count) if count else element

    if k.isa.has_half:
        return Value(k, k.ir.bitcast(k.ir.fptrunc(x.ir, typed(F16)), typed(I16)))
    bits = x.bitcast(typed(I32))
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + ((magnitude >> 13) & 1) + (0xFFF - (112 << 23))) >> 13
    # below 2^-14 a float16 counts units of 2^-24, which are those of float32 in [0.5, 1)
    small = (magnitude.bitcast(x.type) + 0.5).bitcast(typed(I32)) - 0x3F000000
    half = k.select(magnitude < (113 << 23), small, normal)
    half = k.select(magnitude >= 0x477FF000, k.constant(half.type, 0x7C00), half)  # from 65520 on
    half = k.select(magnitude > 0x7F800000, k.constant(half.type, 0x7E00), half)
    return (half | ((bits >> 16) & 0x8000)).truncate(I16)


def sum_of_squares(k: Kernel, x: Value, columns: Value) -> Value:
    """Of `columns` float32 at an address; one chain a lane, then the numbers that fill no vector."""
    lanes, rest = k.variable(k.constant(k.floats, 0.0)), k.variable(k.constant(F32, 0.0))

    def body(offset: Value, kind: Any) -> None:
        value = k.load(kind, x + offset)
        total = lanes if is_vector(kind) else rest
        total.set(k.fma(value, value, total.get()))

    each(k, columns, body)
    return k.sum_lanes(lanes.get()) + rest.get()


def inverse_rms(k: Kernel, x: Value, columns: Value, eps: Value) -> Value:
    """1 / sqrt(mean(x^2) + eps)."""
    mean = sum_of_squares(k, x, columns) / Value(k, k.ir.sitofp(columns.ir, F32))
    return 1.0 / k.unary_float("sqrt", mean + eps)


def normalise(k: Kernel, out: Value, x: Value, *, weight: Value, columns: Value, eps: Value, offset: Value) -> None:
    """out = x / rms(x) * (weight + offset), at addresses of `columns` float32; `out` may be `x`."""
    factor = inverse_rms(k, x, columns, eps)

    def body(place: Value, kind: Any) -> None:
        scaled = k.load(kind, x + place) * spread(k, factor, kind)
        k.store(scaled * (k.load(kind, weight + place) + spread(k, offset, kind)), out + place)

    each(k, columns, body)
