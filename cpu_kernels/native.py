"""What jitted code needs beyond numba: memory by address, atomics, calls by address, and lazily compiled operations.

Knows nothing of programs, threads or vectors. Addresses are int64; nothing is checked. Everything is compiled for the
host and cached on disk by numba, keyed by the file of the function and the host's CPU; a change to this file or to
`vectors.py` alone does not invalidate functions of other files (delete `__pycache__` after such an edit).
"""

import struct
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar, cast

from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic as numba_intrinsic

F = TypeVar("F", bound=Callable[..., Any])

I32, I64, F32, F64, POINTER = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType(), ir.PointerType()
OPERATION_SIGNATURE = "void(CPointer(int64), int64, int64)"
HOST_SIGNATURE = "void(CPointer(int64))"

# numba's own type says what an intrinsic's maker is given, not what its callers give
intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = numba_intrinsic

_compile_lock = threading.Lock()


def jitted(signature: str | None = None) -> Callable[[F], F]:
    """Compiles a function without the interpreter lock; with a signature at once, without one when it is used."""

    def compiled(function: F) -> F:
        return cast(F, njit(signature, nogil=True, cache=True, error_model="numpy")(function))

    return compiled


class Operation:
    """A function `(args, begin, end)` of the program's ABI, compiled when its address is first asked for.

    `args` points to the row's arguments (int64), [begin, end) are the work items. The result for an item must not
    depend on how items are grouped. It never allocates nor throws. With `HOST_SIGNATURE` it is a `(args)` instead.
    """

    def __init__(self, function: Callable[..., None], signature: str = OPERATION_SIGNATURE) -> None:
        self.name = function.__name__
        self._function = function
        self._signature = signature

    @cached_property
    def address(self) -> int:
        """Where the machine code is."""
        with _compile_lock:
            self._compiled = cfunc(self._signature, cache=True, error_model="numpy")(self._function)
        address = self._compiled.address
        assert address is not None, "a compiled function has an address"
        return int(address)


def operation(function: Callable[[Any, int, int], None]) -> Operation:
    """Decorator that makes an `Operation`."""
    return Operation(function)


def host_function(function: Callable[[Any], None]) -> Operation:
    """Decorator for a function `void f(int64 *)` that a GPU's stream or any other thread may call by its address."""
    return Operation(function, HOST_SIGNATURE)


def float_bits(value: float) -> int:
    """A float32 as the argument of an operation; `float_of` gives it back."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def pointer(builder: Any, address: Any) -> Any:
    """An int64 as an LLVM pointer."""
    return builder.inttoptr(address, POINTER)


def call_llvm(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A call of an LLVM intrinsic, declared when it is not yet."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [value.type for value in arguments]), name)
    return builder.call(function, arguments)


def _lowered(result: Any, arguments: tuple[Any, ...], emit: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """What an `@intrinsic` returns: its signature and a code generator that calls emit(builder, *arguments)."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        value = emit(builder, *values)
        return context.get_dummy_value() if result == types.void else value

    return result(*arguments), generate


@intrinsic
def float_of(_context: Any, bits: Any) -> Any:
    """The float32 whose bits are the low half of an int64."""
    return _lowered(types.float32, (types.int64,), lambda b, x: b.bitcast(b.trunc(x, I32), F32))


@intrinsic
def int_at(_context: Any, address: Any) -> Any:
    """The int64 at an address."""
    return _lowered(types.int64, (types.int64,), lambda b, a: b.load(pointer(b, a), align=8, typ=I64))


@intrinsic
def set_int(_context: Any, address: Any, value: Any) -> Any:
    """Stores an int64."""
    return _lowered(types.void, (types.int64, types.int64), lambda b, a, x: b.store(x, pointer(b, a), align=8))


@intrinsic
def int32_at(_context: Any, address: Any) -> Any:
    """The int32 at an address, widened."""
    return _lowered(types.int64, (types.int64,), lambda b, a: b.sext(b.load(pointer(b, a), align=4, typ=I32), I64))


@intrinsic
def set_int32(_context: Any, address: Any, value: Any) -> Any:
    """Stores the low half of an int64."""
    return _lowered(
        types.void, (types.int64, types.int64), lambda b, a, x: b.store(b.trunc(x, I32), pointer(b, a), align=4)
    )


@intrinsic
def float_at(_context: Any, address: Any) -> Any:
    """The float32 at an address."""
    return _lowered(types.float32, (types.int64,), lambda b, a: b.load(pointer(b, a), align=4, typ=F32))


@intrinsic
def set_float(_context: Any, address: Any, value: Any) -> Any:
    """Stores a float32."""
    return _lowered(types.void, (types.int64, types.float32), lambda b, a, x: b.store(x, pointer(b, a), align=4))


@intrinsic
def add_double(_context: Any, address: Any, amount: Any) -> Any:
    """Adds an int64 to the float64 at an address."""

    def emit(b: Any, address: Any, amount: Any) -> Any:
        place = pointer(b, address)
        total = b.fadd(b.load(place, align=8, typ=F64), b.sitofp(amount, F64))
        return b.store(total, place, align=8)

    return _lowered(types.void, (types.int64, types.int64), emit)


@intrinsic
def atomic_load(_context: Any, address: Any) -> Any:
    """The int64 at an address, sequentially consistent."""
    return _lowered(types.int64, (types.int64,), lambda b, a: b.load_atomic(pointer(b, a), "seq_cst", 8, typ=I64))


@intrinsic
def atomic_store(_context: Any, address: Any, value: Any) -> Any:
    """Stores an int64, sequentially consistent."""
    return _lowered(
        types.void,
        (types.int64, types.int64),
        lambda b, a, x: b.store_atomic(x, b.inttoptr(a, I64.as_pointer()), "seq_cst", 8),
    )


@intrinsic
def atomic_add(_context: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at an address and returns what was there before."""
    return _lowered(
        types.int64,
        (types.int64, types.int64),
        lambda b, a, x: b.atomic_rmw("add", b.inttoptr(a, I64.as_pointer()), x, "seq_cst"),
    )


@intrinsic
def atomic_swap_if(_context: Any, address: Any, expected: Any, value: Any) -> Any:
    """Stores `value` if `expected` is there; whether it was."""

    def emit(b: Any, address: Any, expected: Any, value: Any) -> Any:
        pair = b.cmpxchg(b.inttoptr(address, I64.as_pointer()), expected, value, "seq_cst", "seq_cst")
        return b.extract_value(pair, 1)

    return _lowered(types.boolean, (types.int64,) * 3, emit)


@intrinsic
def call_operation(_context: Any, function: Any, args: Any, begin: Any, end: Any) -> Any:
    """Calls an operation by its address; `args` is the address of its arguments."""

    def emit(b: Any, function: Any, args: Any, begin: Any, end: Any) -> Any:
        signature = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I64, I64])
        return b.call(b.inttoptr(function, signature.as_pointer()), [b.inttoptr(args, I64.as_pointer()), begin, end])

    return _lowered(types.void, (types.int64,) * 4, emit)


@intrinsic
def call_futex(_context: Any, syscall: Any, number: Any, address: Any, what: Any, value: Any) -> Any:
    """Calls libc's `syscall`, whose address is given, for the futex at an address; without a time limit."""

    def emit(b: Any, syscall: Any, *arguments: Any) -> Any:
        signature = ir.FunctionType(I64, [I64], var_arg=True)
        return b.call(b.inttoptr(syscall, signature.as_pointer()), [*arguments, I64(0), I64(0), I64(0)])

    return _lowered(types.int64, (types.int64,) * 5, emit)


@intrinsic
def call_io(_context: Any, function: Any, descriptor: Any, address: Any, num_bytes: Any, offset: Any) -> Any:
    """Calls `ssize_t f(int, void *, size_t, off_t)` at an address: `pread`; `read` and `write`, which take no offset.

    -1 where it failed.
    """

    def emit(b: Any, function: Any, descriptor: Any, *arguments: Any) -> Any:
        signature = ir.FunctionType(I64, [I32, I64, I64, I64])
        return b.call(b.inttoptr(function, signature.as_pointer()), [b.trunc(descriptor, I32), *arguments])

    return _lowered(types.int64, (types.int64,) * 5, emit)


@intrinsic
def copy_bytes(_context: Any, to: Any, source: Any, num_bytes: Any) -> Any:
    """Copies bytes between places that do not overlap."""

    def emit(b: Any, to: Any, source: Any, num_bytes: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        name = "llvm.memcpy.p0.p0.i64"
        places = b.inttoptr(to, byte), b.inttoptr(source, byte)
        return call_llvm(b, name, ir.VoidType(), *places, num_bytes, ir.IntType(1)(0))

    return _lowered(types.void, (types.int64,) * 3, emit)


@intrinsic
def call_plain(_context: Any, function: Any) -> Any:
    """Calls the C function `int f(void)` at an address."""

    def emit(b: Any, function: Any) -> Any:
        return b.sext(b.call(b.inttoptr(function, ir.FunctionType(I32, []).as_pointer()), []), I64)

    return _lowered(types.int64, (types.int64,), emit)


@intrinsic
def call_clock(_context: Any, function: Any, clock: Any, address: Any) -> Any:
    """Calls `clock_gettime(clock, address)` at an address."""

    def emit(b: Any, function: Any, clock: Any, address: Any) -> Any:
        signature = ir.FunctionType(I32, [I32, POINTER])
        return b.call(b.inttoptr(function, signature.as_pointer()), [b.trunc(clock, I32), pointer(b, address)])

    return _lowered(types.void, (types.int64,) * 3, emit)


@intrinsic
def pause(_context: Any) -> Any:
    """Tells the CPU that this is a spinning loop."""

    def emit(b: Any) -> Any:
        triple = b.module.triple
        if triple.startswith(("x86_64", "i686", "amd64")):
            return call_llvm(b, "llvm.x86.sse2.pause", ir.VoidType())
        if triple.startswith(("aarch64", "arm64")):
            return call_llvm(b, "llvm.aarch64.hint", ir.VoidType(), I32(1))
        return b.fence("seq_cst")

    return _lowered(types.void, (), emit)
