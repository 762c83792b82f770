"""The frame of a kernel under construction: its arguments, constants and memory, loops and branches.

Used through `simd`, which describes kernels. Every call appends instructions that do not depend on the instruction set,
hints aside. Knows nothing about arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from cpu_kernels.isa import ISA
from cpu_kernels.simd_values import (
    F32,
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

MAX_ARGS = 16


class Builder:
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
