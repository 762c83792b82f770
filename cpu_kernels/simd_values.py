"""Values of a kernel under construction: numbers and vectors with operators, variables, their types.

Used through `simd`, which describes them. Knows nothing about instruction sets.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

if TYPE_CHECKING:
    from cpu_kernels.simd_builder import Builder

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()

Number = int | float


def vector_type(element: Any, count: int) -> Any:
    """The type of `count` elements side by side."""
    return ir.VectorType(element, count)


def is_vector(kind: Any) -> bool:
    """Whether `kind` is a vector type."""
    return isinstance(kind, ir.VectorType)


def element_type(kind: Any) -> Any:
    """The element of a vector type; a scalar type itself."""
    return kind.element if is_vector(kind) else kind


def is_float(kind: Any) -> bool:
    """Whether elements of `kind` are floating-point numbers."""
    return not isinstance(element_type(kind), ir.IntType)


class SplatConstant(ir.Constant):  # type: ignore[misc]
    """A vector of equal constants, in LLVM's short spelling: written out in full they are most of a kernel's text."""

    def __init__(self, kind: Any, element: Any) -> None:
        super().__init__(kind, ir.Undefined)
        self._text = f"splat ({element})"

    def get_reference(self) -> str:
        """How it reads as an operand."""
        return self._text


class Value:
    """A number or a vector inside a kernel; Python numbers beside it become constants of its type."""

    __slots__ = ("ir", "kernel")

    def __init__(self, kernel: "Builder", value: Any) -> None:
        self.kernel = kernel
        self.ir = value

    @property
    def type(self) -> Any:
        """Its LLVM type."""
        return self.ir.type

    def _binary(self, int_op: str, float_op: str | None, other: "Value | Number", swapped: bool = False) -> "Value":
        right = self.kernel.constant(self.type, other) if isinstance(other, int | float) else other
        operation = float_op if is_float(self.type) else int_op
        if operation is None:
            raise TypeError(f"{int_op} is not defined for {self.type}")
        pair = (right.ir, self.ir) if swapped else (self.ir, right.ir)
        return Value(self.kernel, getattr(self.kernel.ir, operation)(*pair))

    def __add__(self, other: "Value | Number") -> "Value":
        return self._binary("add", "fadd", other)

    def __radd__(self, other: Number) -> "Value":
        return self._binary("add", "fadd", other, swapped=True)

    def __sub__(self, other: "Value | Number") -> "Value":
        return self._binary("sub", "fsub", other)

    def __rsub__(self, other: Number) -> "Value":
        return self._binary("sub", "fsub", other, swapped=True)

    def __mul__(self, other: "Value | Number") -> "Value":
        return self._binary("mul", "fmul", other)

    def __rmul__(self, other: Number) -> "Value":
        return self._binary("mul", "fmul", other, swapped=True)

    def __truediv__(self, other: "Value | Number") -> "Value":
        return self._binary("sdiv", "fdiv", other)

    def __rtruediv__(self, other: Number) -> "Value":
        return self._binary("sdiv", "fdiv", other, swapped=True)

    def __floordiv__(self, other: "Value | Number") -> "Value":
        return self._binary("sdiv", None, other)

    def __mod__(self, other: "Value | Number") -> "Value":
        return self._binary("srem", None, other)

    def __and__(self, other: "Value | Number") -> "Value":
        return self._binary("and_", None, other)

    def __or__(self, other: "Value | Number") -> "Value":
        return self._binary("or_", None, other)

    def __xor__(self, other: "Value | Number") -> "Value":
        return self._binary("xor", None, other)

    def __lshift__(self, other: "Value | Number") -> "Value":
        return self._binary("shl", None, other)

    def __rshift__(self, other: "Value | Number") -> "Value":
        return self._binary("lshr", None, other)

    def sar(self, other: "Value | Number") -> "Value":
        """Shift right, copies of the sign entering."""
        return self._binary("ashr", None, other)

    def __neg__(self) -> "Value":
        return Value(self.kernel, self.kernel.ir.fneg(self.ir) if is_float(self.type) else self.kernel.ir.neg(self.ir))

    def _compare(self, sign: str, other: "Value | Number") -> "Value":
        right = self.kernel.constant(self.type, other) if isinstance(other, int | float) else other
        compare = self.kernel.ir.fcmp_ordered if is_float(self.type) else self.kernel.ir.icmp_signed
        return Value(self.kernel, compare(sign, self.ir, right.ir))

    def __lt__(self, other: "Value | Number") -> "Value":
        return self._compare("<", other)

    def __le__(self, other: "Value | Number") -> "Value":
        return self._compare("<=", other)

    def __gt__(self, other: "Value | Number") -> "Value":
        return self._compare(">", other)

    def __ge__(self, other: "Value | Number") -> "Value":
        return self._compare(">=", other)

    def equals(self, other: "Value | Number") -> "Value":
        """Elementwise equality, as booleans."""
        return self._compare("==", other)

    def bitcast(self, kind: Any) -> "Value":
        """The same bits as another type of the same size."""
        return Value(self.kernel, self.kernel.ir.bitcast(self.ir, kind))

    def to_float(self) -> "Value":
        """Signed integers to float32, rounded to nearest."""
        return Value(self.kernel, self.kernel.ir.sitofp(self.ir, self._with_element(F32)))

    def to_int(self, element: Any = I32) -> "Value":
        """Floats to signed integers, towards zero."""
        return Value(self.kernel, self.kernel.ir.fptosi(self.ir, self._with_element(element)))

    def extend(self, element: Any, signed: bool) -> "Value":
        """Integers to wider integers."""
        cast = self.kernel.ir.sext if signed else self.kernel.ir.zext
        return Value(self.kernel, cast(self.ir, self._with_element(element)))

    def truncate(self, element: Any) -> "Value":
        """The low bits of integers."""
        return Value(self.kernel, self.kernel.ir.trunc(self.ir, self._with_element(element)))

    def _with_element(self, element: Any) -> Any:
        return vector_type(element, self.type.count) if is_vector(self.type) else element

    def lane(self, index: "int | Value") -> "Value":
        """One element of a vector."""
        position = I32(index) if isinstance(index, int) else index.ir
        return Value(self.kernel, self.kernel.ir.extract_element(self.ir, position))

    def with_lane(self, index: int, element: "Value") -> "Value":
        """The vector with one element replaced."""
        return Value(self.kernel, self.kernel.ir.insert_element(self.ir, element.ir, I32(index)))

    def shuffle(self, order: Sequence[int], other: "Value | None" = None) -> "Value":
        """Elements in another order; indices past the end are those of `other`."""
        second = ir.Constant(self.type, ir.Undefined) if other is None else other.ir
        mask = ir.Constant(vector_type(I32, len(order)), list(order))
        return Value(self.kernel, self.kernel.ir.shuffle_vector(self.ir, second, mask))


class Variable:
    """A value that changes from turn to turn of a loop."""

    __slots__ = ("kernel", "slot")

    def __init__(self, kernel: "Builder", initial: Value) -> None:
        self.kernel = kernel
        with kernel.ir.goto_entry_block():
            self.slot = kernel.ir.alloca(initial.type)
        self.set(initial)

    def get(self) -> Value:
        """What it is now."""
        return Value(self.kernel, self.kernel.ir.load(self.slot))

    def set(self, value: Value) -> None:
        """Gives it a new value of the same type."""
        self.kernel.ir.store(value.ir, self.slot)

    def add(self, value: "Value | Number") -> None:
        """Adds to it."""
        self.set(self.get() + value)
