"""Kernels as LLVM IR, written in Python: values that stand for numbers and vectors of a kernel under construction.

A kernel is a function of a `Kernel`: it calls its methods and uses operators on `Value`s, and each call appends an
instruction. The same function gives code for every `ISA`, whose width and dot product the kernel asks for. Python's own
loops and conditions run while the kernel is built (they unroll); `loop` and `when` make loops and branches of the
kernel. Knows nothing about quant types or operations.

Invariants: no fast-math flags, so that a sum has one order; integers wrap; `>>` is logical and `sar` arithmetic;
addresses are int64 and loads need no alignment.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from cpu_kernels.isa import ISA, Dot
from cpu_kernels.simd_values import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    Number,
    SplatConstant,
    Value,
    Variable,
    element_type,
    is_float,
    is_vector,
    vector_type,
)

__all__ = [
    "F16",
    "F32",
    "I8",
    "I16",
    "I32",
    "I64",
    "MAX_ARGS",
    "Kernel",
    "Number",
    "Value",
    "Variable",
    "element_type",
    "is_float",
    "is_vector",
    "vector_type",
]

MAX_ARGS = 16


class Kernel:
    """One function under construction: `void name(const int64_t *args, int64_t begin, int64_t end)`."""

    def __init__(self, name: str, isa: ISA) -> None:
        self.isa = isa
        self.module = ir.Module(name)
        self.lanes = isa.lanes
        self.bytes = vector_type(I8, 4 * isa.lanes)
        self.words = vector_type(I16, 2 * isa.lanes)
        self.ints = vector_type(I32, isa.lanes)
        self.floats = vector_type(F32, isa.lanes)
        self._enter(ir.Function(self.module, ir.FunctionType(ir.VoidType(), [POINTER, I64, I64]), name))
        self._args, self.begin, self.end = (Value(self, argument) for argument in self.function.args)

    def _enter(self, function: Any) -> None:
        self.function = function
        self.ir = ir.IRBuilder(function.append_basic_block("entry"))

    @contextmanager
    def subroutine(self, name: str, count: int) -> Iterator[tuple[Any, list[Value]]]:
        """A second function of `count` int64 arguments, to `call` from the kernel; its body is written inside."""
        outer = self.function, self.ir
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * count), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        self._enter(function)
        yield function, [Value(self, argument) for argument in function.args]
        self.ir.ret_void()
        self.function, self.ir = outer

    def call(self, function: Any, *args: Value) -> None:
        """Calls a subroutine."""
        self.ir.call(function, [argument.ir for argument in args])

    def arg(self, index: int) -> Value:
        """The int64 at `index` of the argument row."""
        if not 0 <= index < MAX_ARGS:
            raise ValueError(f"an argument row has {MAX_ARGS} entries, not one at {index}")
        return Value(self, self.ir.load(self.ir.gep(self._args.ir, [I32(index)], source_etype=I64), typ=I64))

    def float_arg(self, index: int) -> Value:
        """The float32 whose bits are the low half of an argument."""
        return self.arg(index).truncate(I32).bitcast(F32)

    # Constants and memory

    def constant(self, kind: Any, value: Number) -> Value:
        """A constant; in every element if `kind` is a vector."""
        number = ir.Constant(element_type(kind), float(value) if is_float(kind) else int(value))
        return Value(self, SplatConstant(kind, number) if is_vector(kind) else number)

    def int64(self, value: "int | Value") -> Value:
        """An int64, as sizes and addresses are."""
        return self.constant(I64, value) if isinstance(value, int) else value

    def table(self, element: Any, values: Sequence[Number]) -> Value:
        """A constant vector with these elements."""
        return Value(self, ir.Constant(vector_type(element, len(values)), list(values)))

    def load(self, kind: Any, address: Value) -> Value:
        """The value at an address."""
        return Value(self, self.ir.load(self.ir.inttoptr(address.ir, POINTER), align=1, typ=kind))

    def store(self, value: Value, address: Value) -> None:
        """Puts a value at an address."""
        self.ir.store(value.ir, self.ir.inttoptr(address.ir, value.type.as_pointer()), align=1)

    def scratch(self, num_bytes: int) -> Value:
        """The address of memory of this function's own, aligned to 64 bytes."""
        with self.ir.goto_entry_block():
            slot = self.ir.alloca(ir.ArrayType(I8, num_bytes))
            slot.align = 64
            return Value(self, self.ir.ptrtoint(slot, I64))

    def splat(self, value: Value, count: int | None = None) -> Value:
        """A vector whose elements all are `value`; as many as the ISA has lanes unless `count` says otherwise."""
        size = self.lanes if count is None else count
        one = self.ir.insert_element(ir.Constant(vector_type(value.type, size), ir.Undefined), value.ir, I32(0))
        zeros = ir.Constant(vector_type(I32, size), None)
        undefined = ir.Constant(one.type, ir.Undefined)
        return Value(self, self.ir.shuffle_vector(one, undefined, zeros))

    def load_splat(self, kind: Any, address: Value) -> Value:
        """One number from memory in every lane."""
        return self.splat(self.load(kind, address))

    def load_bytes4(self, address: Value) -> Value:
        """Four bytes from memory in every lane, as a vector of bytes."""
        return self.load_splat(I32, address).bitcast(self.bytes)

    def prefetch(self, address: Value, offset: int = 0) -> None:
        """Asks for the cache line at an address; never faults.

        On x86 as inline assembly that keeps its place among loads: LLVM gathers plain prefetches of a loop into one
        burst, which cost up to a fifth of the read bandwidth (Zen 5), and it stops loads from being kept in registers
        over long stretches, which spills others.
        """
        if not self.isa.is_arm:
            signature = ir.FunctionType(ir.VoidType(), [I64])
            self.ir.asm(signature, f"prefetcht0 {offset}($0)", "r,~{memory}", [address.ir], True)
            return
        place = (address + offset).ir
        hint = (I32(0), I32(3), I32(1))  # read, keep in all caches, data
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), Value(self, self.ir.inttoptr(place, POINTER)), *hint)

    def keep_order(self) -> None:
        """Nothing is loaded or stored earlier or later than it stands across this point.

        LLVM else loads weights long before they are used, and spills others when registers are few: with it Q6_K at 8
        columns went from 205 to 240 Gmac/s, but without it at 1 column Q1_0 went from 127 to 160 (Zen 5).
        """
        if not self.isa.is_arm:
            self.ir.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)

    # Control

    @contextmanager
    def loop(self, start: "int | Value", stop: "int | Value", step: "int | Value" = 1) -> Iterator[Value]:
        """A loop over int64 `range(start, stop, step)`, `step` positive; gives the index."""
        index = Variable(self, self.int64(start))
        head, body, after = (self.function.append_basic_block(part) for part in ("head", "body", "after"))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        self.ir.cbranch((index.get() < self.int64(stop)).ir, body, after)
        self.ir.position_at_end(body)
        yield index.get()
        index.add(step)
        self.ir.branch(head)
        self.ir.position_at_end(after)

    @contextmanager
    def repeat(self, goes_on: Callable[[], Value]) -> Iterator[None]:
        """A loop that runs as long as what `goes_on` builds holds, asked before every turn."""
        head, body, after = (self.function.append_basic_block(part) for part in ("head", "body", "after"))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        self.ir.cbranch(goes_on().ir, body, after)
        self.ir.position_at_end(body)
        yield
        self.ir.branch(head)
        self.ir.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """A branch taken if a boolean holds."""
        body, after = self.function.append_basic_block("then"), self.function.append_basic_block("endif")
        self.ir.cbranch(condition.ir, body, after)
        self.ir.position_at_end(body)
        yield
        self.ir.branch(after)
        self.ir.position_at_end(after)

    def variable(self, initial: Value) -> Variable:
        """A value that loops may change."""
        return Variable(self, initial)

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """`yes` where the condition holds, else `no`."""
        return Value(self, self.ir.select(condition.ir, yes.ir, no.ir))

    def minimum(self, left: Value, right: Value) -> Value:
        """The lesser of signed integers or floats (floats: the second if either is NaN)."""
        return self.select(left < right, left, right)

    def maximum(self, left: Value, right: Value) -> Value:
        """The greater of signed integers or floats (floats: the second if either is NaN)."""
        return self.select(left > right, left, right)

    def intrinsic(self, name: str, result: Any, *args: Any) -> Value:
        """A call of an LLVM intrinsic."""
        operands = [argument.ir if isinstance(argument, Value) else argument for argument in args]
        function = self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(result, [operand.type for operand in operands]), name
        )
        return Value(self, self.ir.call(function, operands))

    # Arithmetic that differs between instruction sets

    def fma(self, left: Value, right: Value, addend: Value) -> Value:
        """left * right + addend: rounded once where the ISA has it, twice where not."""
        if not self.isa.has_fma:
            return left * right + addend
        suffix = f"v{left.type.count}f32" if is_vector(left.type) else "f32"
        return self.intrinsic(f"llvm.fma.{suffix}", left.type, left, right, addend)

    def unary_float(self, name: str, value: Value) -> Value:
        """An LLVM float function by name: sqrt, fabs, floor, rint."""
        suffix = f"v{value.type.count}f32" if is_vector(value.type) else "f32"
        return self.intrinsic(f"llvm.{name}.{suffix}", value.type, value)

    def round_to_int(self, value: Value) -> Value:
        """Float32 to int32, to nearest, ties to even; for magnitudes up to 2^22."""
        magic = 12582912.0  # 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
        kind = vector_type(I32, value.type.count) if is_vector(value.type) else I32
        return (value + magic).bitcast(kind) - 0x4B400000

    def half_to_float(self, bits: Value) -> Value:
        """float16 given as int16 bits, to float32, exact."""
        count = bits.type.count if is_vector(bits.type) else 0
        wide = vector_type(F32, count) if count else F32
        if self.isa.has_half:
            half = vector_type(F16, count) if count else F16
            return Value(self, self.ir.fpext(self.ir.bitcast(bits.ir, half), wide))
        word = bits.extend(I32, signed=False)
        magnitude = (word & 0x7FFF) << 13
        scaled = (magnitude.bitcast(wide) * 2.0**112).bitcast(magnitude.type)
        special = magnitude >= (0x7C00 << 13)  # infinity and NaN keep the greatest exponent
        value = self.select(special, magnitude | 0x7F800000, scaled)
        return (value | ((word & 0x8000) << 16)).bitcast(wide)

    def dot(self, total: Value, weights: Value, activations: Value) -> Value:
        """total + four products in each int32 lane; unsigned bytes up to 127 (255 if `isa.unsigned_bytes`) x signed."""
        match self.isa.dot:
            case Dot.VPDPBUSD:
                kind = total.type
                packed = (weights.bitcast(kind), activations.bitcast(kind))
                return self.intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * kind.count}", kind, total, *packed)
            case Dot.PMADDUBSW:
                return total + self._add_pairs(
                    self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", self.words, weights, activations)
                )
            case Dot.SDOT:
                return self._sdot(total, weights, activations)
            case Dot.PORTABLE:
                return self._portable_dot(total, weights, activations, signed=False)

    def dot_signed(self, total: Value, weights: Value, activations: Value) -> Value:
        """total + four products in each int32 lane of signed bytes; activations not -128. Not on `unsigned_bytes` ISAs.

        pmaddubsw: |w| * (x with w's sign), at most 128 * 127 * 2 = 32512, so nothing saturates.
        """
        match self.isa.dot:
            case Dot.VPDPBUSD:
                raise TypeError("vpdpbusd takes unsigned weights: add 128 to them and correct with the sum")
            case Dot.PMADDUBSW:
                magnitude = self.intrinsic("llvm.abs.v32i8", self.bytes, weights, I1(0))
                signed = self.intrinsic("llvm.x86.avx2.psign.b", self.bytes, activations, weights)
                return total + self._add_pairs(
                    self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", self.words, magnitude, signed)
                )
            case Dot.SDOT:
                return self._sdot(total, weights, activations)
            case Dot.PORTABLE:
                return self._portable_dot(total, weights, activations, signed=True)

    def dot_words(self, total: Value, left: Value, right: Value) -> Value:
        """total + two products in each int32 lane of signed words; on x86 one wide instruction, exact."""
        match self.isa.dot:
            case Dot.VPDPBUSD:
                kind = total.type
                packed = (left.bitcast(kind), right.bitcast(kind))
                return self.intrinsic(f"llvm.x86.avx512.vpdpwssd.{32 * kind.count}", kind, total, *packed)
            case Dot.PMADDUBSW:
                return total + self.intrinsic("llvm.x86.avx2.pmadd.wd", self.ints, left, right)
            case _:
                products = left.extend(I32, signed=True) * right.extend(I32, signed=True)
                count = products.type.count
                return total + products.shuffle(range(0, count, 2)) + products.shuffle(range(1, count, 2))

    def _add_pairs(self, words: Value) -> Value:
        return self.intrinsic("llvm.x86.avx2.pmadd.wd", self.ints, words, self.constant(self.words, 1))

    def _sdot(self, total: Value, weights: Value, activations: Value) -> Value:
        return self.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", self.ints, total, weights, activations)

    def _portable_dot(self, total: Value, weights: Value, activations: Value, signed: bool) -> Value:
        products = weights.extend(I32, signed) * activations.extend(I32, signed=True)
        for _ in range(2):
            count = products.type.count
            products = products.shuffle(range(0, count, 2)) + products.shuffle(range(1, count, 2))
        return total + products

    def byte_table(self, values: Sequence[int]) -> Value:
        """A table of 16 bytes for `look_up`."""
        return self.table(I8, [value & 255 for value in values] * (self.lanes // 4))

    def look_up(self, table: Value, index: Value) -> Value:
        """The table's byte for every index byte 0-15."""
        count = index.type.count
        if self.isa.is_arm and self.isa.dot is Dot.SDOT:
            return self.intrinsic("llvm.aarch64.neon.tbl1.v16i8", index.type, table, index)
        if count == 64 and "avx512bw" in self.isa.needs:
            return self.intrinsic("llvm.x86.avx512.pshuf.b.512", index.type, table, index)
        if count == 32 and "avx2" in self.isa.needs:
            return self.intrinsic("llvm.x86.avx2.pshuf.b", index.type, table, index)
        result = self.constant(index.type, 0)
        for entry in range(16):
            value = table.shuffle([entry] * count)
            result = self.select(index.equals(entry), value, result)
        return result

    def look_up_wide(self, table: Value, index: Value) -> Value:
        """The table's byte for every index byte 0-63; where `isa.has_wide_lookup`."""
        return self.intrinsic("llvm.x86.avx512.permvar.qi.512", index.type, table, index)

    def look_up_256(self, tables: Sequence[Value], index: Value) -> Value:
        """The byte of four tables of 64 for every unsigned index byte; where `isa.has_wide_lookup`."""
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        low, high = (self.intrinsic(name, index.type, tables[half], index, tables[half + 1]) for half in (0, 2))
        return self.select(index < 0, high, low)

    # Bit fields of bytes

    def byte_shift(self, value: Value, right: int, mask: int) -> Value:
        """Every byte shifted right by `right` (left if negative) and masked; the mask must clear what crosses over."""
        if right:
            words = value.bitcast(vector_type(I16, value.type.count // 2))
            value = (words >> right if right > 0 else words << -right).bitcast(value.type)
        return value & (mask if mask < 128 else mask - 256)

    def sum_lanes(self, value: Value) -> Value:
        """The sum of a vector's elements, halves added to halves."""
        while value.type.count > 1:
            half = value.type.count // 2
            value = value.shuffle(range(half)) + value.shuffle(range(half, 2 * half))
        return value.lane(0)

    def max_lanes(self, value: Value) -> Value:
        """The greatest of a vector's elements."""
        while value.type.count > 1:
            half = value.type.count // 2
            value = self.maximum(value.shuffle(range(half)), value.shuffle(range(half, 2 * half)))
        return value.lane(0)
