"""Compiles the launches of Triton kernels to PTX for any NVIDIA GPU, without one: what would run there, to be read.

`recorded` collects launches instead of making them, so that what is compiled is what the wrappers would launch, with
their tiles; tensors may lie on the CPU. Knows nothing about single kernels.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped, unused-ignore]
from triton.compiler import ASTSource  # type: ignore[import-untyped, unused-ignore]
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped, unused-ignore]

CAPABILITIES = (61, 75, 80, 86, 89, 90, 120)
# KiB of shared memory that a program may have (CUDA programming guide, technical specifications).
SHARED_KIB = {61: 48, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told besides arguments."""
        return {name: self.keywords[name] for name in _OPTIONS if name in self.keywords}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a launch."""

    ptx: str
    shared_bytes: int  # of one program
    sums: tuple[str, ...]  # for every kind of sum over a dimension, the tensor's shape and layout: they fix its order


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches made inside, and makes none. Not for threads: all launches of the process are collected."""
    launches: list[Launch] = []

    def collect(kernel: Any, *arguments: Any, grid: Sequence[int], warmup: bool = False, **keywords: Any) -> None:
        launches.append(Launch(kernel, arguments, keywords))

    original = JITFunction.run
    JITFunction.run = collect
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_ptx(launch: Launch, capability: int) -> Compiled:
    """The PTX of a launch for a GPU such as 86 (sm_86); whatever the compiler raises comes out.

    Arguments are specialised as at a launch: multiples of 16 are known as such, and the number 1 is a constant.
    """
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    values.update({name: value for name, value in launch.keywords.items() if name not in _OPTIONS})
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, tuple):
            signature[parameter.name] = ("i64",) * len(value)
        else:
            signature[parameter.name] = _type_of(value)
            if not parameter.do_not_specialize and _is_aligned(value):
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return Compiled(str(compiled.asm["ptx"]), int(compiled.metadata.shared), _sums(str(compiled.asm["ttgir"])))


def _sums(text: str) -> tuple[str, ...]:
    """Of Triton's intermediate code for GPUs: reductions, with names of layouts replaced by what they stand for."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = re.findall(r"tt\.reduce\".*?axis = (\d+).*?\}\) : \((tensor<.*?>)\) ->", text, re.DOTALL)
    kinds = {(axis, re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), kind)) for axis, kind in found}
    return tuple(sorted(f"{axis} {kind}" for axis, kind in kinds))


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if abs(value) < 1 << 31 else "i64"
    raise TypeError(f"an argument of type {type(value).__name__}")


def _is_aligned(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
