"""Machines described in JSON: five typical ones that come with the package, and any other that a file describes.

A description is a `planner.machine.Machine` as a document. Kernel rates that it does not state are derived from its
RAM bandwidth and its stated multiplication rate with the shares that the kernels were measured to reach. Knows nothing
about models or plans.

Invariant: a machine that is loaded has kernels of every quant type that can be computed with, at every thread count of
its read rates.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

from cpu_kernels.quant_types import quant_type
from offload.errors import RequestError
from planner import document
from planner.machine import Cpu, KernelPoint, Machine

MACHINES_DIRECTORY = Path(__file__).parent / "machines"
MACHINES = tuple(sorted(path.stem for path in MACHINES_DIRECTORY.glob("*.json")))

COLUMNS = (1, 8, 32, 128)  # of the points derived
# Products of 2048 x 4096 on one thread of an AMD EPYC (family 26, AVX512-VNNI), `scripts/bench_kernels.py`: at one
# column the share of a pure read of as many bytes (at most 1), at 128 columns multiplications a second against Q4_0's.
SHARES: Mapping[str, tuple[float, float]] = {
    "F32": (1.00, 0.27),
    "F16": (1.00, 0.35),
    "Q4_0": (0.95, 1.00),
    "Q4_1": (0.92, 1.00),
    "Q5_0": (0.88, 0.89),
    "Q5_1": (0.89, 0.88),
    "Q8_0": (1.00, 0.95),
    "Q2_K": (0.92, 0.81),
    "Q3_K": (0.91, 0.83),
    "Q4_K": (0.90, 0.97),
    "Q5_K": (0.97, 0.96),
    "Q6_K": (0.82, 0.77),
    "IQ2_XXS": (0.89, 0.96),
    "IQ2_XS": (0.85, 0.85),
    "IQ3_XXS": (0.96, 0.98),
    "IQ1_S": (0.88, 0.99),
    "IQ4_NL": (0.92, 1.00),
    "IQ3_S": (0.96, 0.98),
    "IQ2_S": (0.87, 0.86),
    "IQ4_XS": (1.00, 0.99),
    "IQ1_M": (0.87, 0.86),
    "BF16": (0.99, 0.35),
    "TQ1_0": (0.89, 1.06),
    "TQ2_0": (1.00, 1.03),
    "MXFP4": (0.99, 1.03),
    "NVFP4": (1.00, 0.87),
    "Q1_0": (0.79, 1.03),
    "Q2_0": (0.97, 1.01),
}
REFERENCE_TYPE = "Q4_0"  # whose stated rate says how fast the CPU multiplies
# What Q4_0 reaches with AVX2, 94 Gmac/s on one thread of the same CPU, against 99 Gflop/s of float32 products.
REFERENCE_MACS_PER_FLOP = 0.95


def load_machine(name: str | Path) -> Machine:
    """The machine of that name or file.

    RequestError where there is neither, where the file is no description (the field is named), and where a figure
    could not be a machine's.
    """
    path = _path(str(name))
    hint = f"name a JSON file or one of {', '.join(MACHINES)}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RequestError(f"no machine {str(name)!r}: {reason}", hint=hint) from error
    try:
        machine = document.loads(Machine, text)
        _check(machine, "")
        _check_lists(machine)
    except ValueError as error:
        raise RequestError(f"{path}: not a machine description: {error}", hint=hint) from error
    return replace(machine, cpu=with_kernels(machine.cpu))


def with_kernels(cpu: Cpu) -> Cpu:
    """`cpu` with points of every quant type, at 1 to 128 columns and the thread counts of its read rates.

    Stated points stay. A derived product takes as long as reading its weights or as its multiplications, whichever is
    longer. Multiplications a second of Q4_0 on all threads: the fastest stated, else 0.95 times the float32 operations;
    other types have their share of it, and fewer threads their part.
    """
    stated = [point.macs_per_s for point in cpu.kernels.get(REFERENCE_TYPE, ())]
    macs_per_s = max(stated, default=REFERENCE_MACS_PER_FLOP * cpu.flops_per_s)
    kernels = dict(cpu.kernels)
    for name in SHARES:
        points = {(point.threads, point.columns): point for point in _derived(cpu, name, macs_per_s)}
        points |= {(point.threads, point.columns): point for point in cpu.kernels.get(name, ())}
        kernels[name] = tuple(points[place] for place in sorted(points))
    return replace(cpu, kernels=kernels)


def _derived(cpu: Cpu, name: str, macs_per_s: float) -> Iterator[KernelPoint]:
    """Points of a quant type where the CPU makes `macs_per_s` multiplications of Q4_0 on all threads."""
    read_share, macs_share = SHARES[name]
    weight_bytes = quant_type(name).bits_per_weight / 8
    for read in cpu.read:
        macs = macs_share * macs_per_s * min(read.at / cpu.threads, 1.0)
        for columns in COLUMNS:
            weight_s = max(weight_bytes / (read_share * read.bytes_per_s), columns / macs)
            yield KernelPoint(read.at, columns, weight_bytes / weight_s, columns / weight_s)


def _path(name: str) -> Path:
    """Where the description lies; a file of that name goes before a machine that comes with the package."""
    stem = name.removesuffix(".json")
    return MACHINES_DIRECTORY / f"{stem}.json" if stem in MACHINES and not Path(name).is_file() else Path(name)


def _check(value: object, where: str) -> None:
    """ValueError, naming the field, for negative numbers and for rates and counts of 0."""
    if is_dataclass(value):
        for field in fields(value):
            _check(getattr(value, field.name), f"{where}.{field.name}" if where else field.name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check(item, f"{where}.{key}")
    elif isinstance(value, int | float):
        name = where.rpartition(".")[2]
        least = "more than 0" if name.endswith("_per_s") or name in _COUNTS else "at least 0"
        if value < 0 or (value == 0 and least == "more than 0"):
            raise ValueError(f"{where} is {value}: it must be {least}")


def _check_lists(machine: Machine) -> None:
    """ValueError, naming the field, where a curve has no point or does not rise."""
    threads = [point.at for point in machine.cpu.read]
    if not threads or threads != sorted(set(threads)):
        raise ValueError("cpu.read must have points of a rising number of threads")
    if machine.flash is not None and not machine.flash.points:
        raise ValueError("flash.points is empty")


_COUNTS = frozenset({"threads", "at", "columns", "depth", "read_bytes"})
