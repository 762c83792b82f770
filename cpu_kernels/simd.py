"""Kernels as LLVM IR, written in Python: values that stand for numbers and vectors of a kernel under construction.

A kernel is a function of a `Kernel`: it calls its methods and uses operators on `Value`s, and each call appends an
instruction. The same function gives code for every `ISA`, whose width and dot product the kernel asks for. Python's own
loops and conditions run while the kernel is built (they unroll); `loop` and `when` make loops and branches of the
kernel. Knows nothing about quant types or operations.

Invariants: no fast-math flags, so that a sum has one order; integers wrap; `>>` is logical and `sar` arithmetic;
addresses are int64 and loads need no alignment.
"""

from collections.abc import Sequence

from cpu_kernels.isa import Dot
from cpu_kernels.simd_builder import MAX_ARGS, Builder
from cpu_kernels.simd_values import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    Number,
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


class Kernel(Builder):
    """A `Builder` with the arithmetic that differs between instruction sets, and what is made of it."""

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
