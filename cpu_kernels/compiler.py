"""From a kernel written over `simd` to the address of machine code, through a cache of object code on disk.

The cache lies under `$XDG_CACHE_HOME/strata/kernels` (by default `~/.cache`). A kernel's file name is a hash of
everything its code depends on: the text of the modules of this package, LLVM's version, the ISA, this CPU's name and
features, the kernel's name. Files are written whole and renamed into place, and begin with a checksum: one that is cut
or altered is compiled anew. A cache that cannot be written costs time, never correctness; it is logged.
Knows nothing about what kernels compute.
"""

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from cpu_kernels.isa import ISA, host_features
from cpu_kernels.simd import Kernel

Trace = Callable[[Kernel], None]

_CHECKSUM_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger("strata.kernels")
_lock = threading.RLock()
_engines: list[Any] = []  # machine code lives as long as the process
_addresses: dict[tuple[str, ISA], int] = {}


def kernel_address(name: str, isa: ISA, trace: Trace, *, thorough: bool = True) -> int:
    """The address of kernel `name` for `isa`, which `trace` writes; compiled at most once, by any thread.

    The name must tell apart whatever makes `trace` write different code. Not `thorough` is for long straight-line
    kernels: a few passes, a fifth of the time of LLVM's whole pipeline (Q6_K: 40 ms against 250) and code of the same
    speed. ValueError if the ISA is only for looking at.
    """
    if isa.triple:
        raise ValueError(f"{isa.name} is cross-compiled and does not run here")
    with _lock:
        address = _addresses.get((name, isa))
        if address is None:
            address = _addresses[name, isa] = _load(name, _object_code(name, isa, trace, thorough))
        return address


def assembly(name: str, isa: ISA, trace: Trace, *, thorough: bool = True) -> str:
    """The instructions a kernel becomes, as text; also for an ISA of another machine."""
    with _lock:
        machine = _target_machine(isa)
        return str(machine.emit_assembly(_optimised(name, isa, trace, machine, thorough)))


def cache_folder() -> Path:
    """Where object code is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "strata" / "kernels"


def _object_code(name: str, isa: ISA, trace: Trace, thorough: bool) -> bytes:
    path = cache_folder() / f"{_key(name, isa)}.o"
    code = _read(path)
    if code is None:
        machine = _target_machine(isa)
        code = bytes(machine.emit_object(_optimised(name, isa, trace, machine, thorough)))
        _write(path, code)
    return code


def _optimised(name: str, isa: ISA, trace: Trace, machine: Any, thorough: bool) -> Any:
    kernel = Kernel(name, isa)
    trace(kernel)
    kernel.ir.ret_void()
    kernel.module.triple = isa.triple or llvm.get_process_triple()
    module = llvm.parse_assembly(str(kernel.module))
    module.verify()
    module.data_layout = str(machine.target_data)
    # Kernels are vectorised and unrolled by hand; LLVM doing it again costs compile time and registers.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    if thorough:
        builder.getModulePassManager().run(module, builder)
        return module
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_loop_rotate_pass()
    passes.run(module, builder)
    return module


@cache
def _initialise() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()


def _target_machine(isa: ISA) -> Any:
    _initialise()
    cpu, features = isa.cpu, isa.features
    if not cpu:
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_triple(isa.triple or llvm.get_process_triple())
    model = "default" if isa.triple else "jitdefault"
    return target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel=model, jit=not isa.triple)


def _load(name: str, code: bytes) -> int:
    empty = llvm.parse_assembly("")
    engine = llvm.create_mcjit_compiler(empty, _host_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address = int(engine.get_function_address(name))
    if not address:
        raise ValueError(f"compiled code of kernel {name} does not define it")
    return address


def _host_machine() -> Any:
    _initialise()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(codemodel="jitdefault", jit=True)


def _key(name: str, isa: ISA) -> str:
    parts = (_sources(), llvmlite.__version__, repr(llvm.llvm_version_info), _described(isa), _host(), name)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _described(isa: ISA) -> str:
    """Everything an ISA says; in one order in every process, which a set's own text is not."""
    values = {field.name: getattr(isa, field.name) for field in fields(isa)}
    return repr({**values, "needs": sorted(isa.needs)})


@cache
def _host() -> str:
    return f"{llvm.get_host_cpu_name()} {' '.join(sorted(host_features()))}"


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("kernel cache %s cannot be read (%s): compiling", path, error)
        return None
    checksum, code = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if hashlib.sha256(code).digest() != checksum:
        _log.warning("kernel cache %s is damaged: compiling anew", path)
        return None
    return code


def _write(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("kernel cache %s cannot be written: %s", path, error)
