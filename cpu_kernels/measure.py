"""How fast matmul kernels are on this machine, beside a pure read of memory and a pure loop of multiplications.

Weights go round a working set larger than the caches. Every timed product is followed by a read of as many bytes in the
same run of a program, timed by the pool's own clock, and medians are reported. Weights are bytes that make scales of
ordinary size; what they stand for does not matter. Knows nothing about models.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import isa as ladder
from cpu_kernels.activations import ActivationKind, quantize_row
from cpu_kernels.compiler import kernel_address
from cpu_kernels.formats import PanelFormat, has_panel_format, panel_format
from cpu_kernels.isa import ISA
from cpu_kernels.matmul import matmul_row
from cpu_kernels.memory import aligned_bytes
from cpu_kernels.pool import Pool
from cpu_kernels.program import Program, Row
from cpu_kernels.quant_types import QuantType
from cpu_kernels.simd import F32, Kernel
from cpu_kernels.tuning import Family

WORKING_SET_BYTES = 320 << 20  # ten times the last-level cache of the CPU this was tuned on
ROWS, COLUMNS = 2048, 4096  # of the matrices
_READ_BYTES = 4096  # of one work item
_READ_CHAINS = 4
_PEAK_CHAINS = 12  # enough for the latency, and few enough for 16 registers
_PEAK_TURNS = 2048  # of one work item
_PEAK_ITEMS = 64
_MIN_RUNS, _MAX_RUNS = 5, 60


@dataclass(frozen=True, slots=True)
class KernelFigure:
    """One kernel at one number of columns. Rates are decimal (GB/s) and of all threads together."""

    quant_type: str
    family: Family
    isa: str
    tile_columns: int
    columns: int
    threads: int
    seconds: float
    gb_per_s: float  # of panels
    read_gb_per_s: float  # of the pure read in the same run
    share_of_read: float
    gmac_per_s: float
    share_of_peak: float  # of a loop of the same instruction on registers; tables can exceed it
    quantize_seconds: float  # of the activations, which several products may share


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians of one kernel, seconds, and the median of the ratio read / product in pairs."""

    product: float
    read: float
    share_of_read: float


def kernel_table(
    quant_types: Iterable[QuantType],
    columns: Sequence[int],
    *,
    threads: int,
    seconds_budget: float,
    isa: ISA | None = None,
) -> list[KernelFigure]:
    """`format_table` of every family that has kernels for the types; `isa`: the one in use unless given."""
    used = isa or ladder.current()
    forms = [
        panel_format(kind, used, family) for kind in quant_types for family in Family if has_panel_format(kind, family)
    ]
    return format_table(forms, columns, threads=threads, seconds_budget=seconds_budget, isa=used)


def format_table(
    forms: Sequence[PanelFormat], columns: Sequence[int], *, threads: int, seconds_budget: float, isa: ISA
) -> list[KernelFigure]:
    """Figures of formats made for `isa`, at every number of columns.

    About `seconds_budget` are spent measuring, five runs of each at least; compiling what is not cached comes on top.
    NotImplementedError where the system has no clock that programs can read.
    """
    if not forms or not columns:
        return []
    share = seconds_budget / (len(forms) * len(columns))
    with Bench(threads) as bench:
        peaks = {kind: bench.peak(isa, kind) for kind in {form.activation_kind for form in forms}}
        return [bench.figure(form, n, share, peaks[form.activation_kind]) for form in forms for n in columns]


class Bench:
    """A pool and weights to measure with; a context manager."""

    def __init__(self, threads: int, working_set_bytes: int = WORKING_SET_BYTES) -> None:
        self.threads = threads
        self._pool = Pool(threads)
        self._weights = aligned_bytes(working_set_bytes)
        self._weights[:] = np.resize(np.random.default_rng(0).integers(16, 60, 1 << 20, np.uint8), working_set_bytes)
        self._sink = aligned_bytes(64)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.close()

    def figure(self, form: PanelFormat, n: int, seconds: float, peak: float) -> KernelFigure:
        """Measures for about `seconds`; `peak`: multiplications a second."""
        timing = self.time(form, n, seconds)
        num_bytes = form.panel_bytes(ROWS, COLUMNS)
        rate = ROWS * COLUMNS * n / timing.product
        return KernelFigure(
            quant_type=form.quant_type.name,
            family=form.family,
            isa=form.isa.name,
            tile_columns=form.isa.tile_columns,
            columns=n,
            threads=self.threads,
            seconds=timing.product,
            gb_per_s=num_bytes / timing.product / 1e9,
            read_gb_per_s=num_bytes / timing.read / 1e9,
            share_of_read=timing.share_of_read,
            gmac_per_s=rate / 1e9,
            share_of_peak=rate / peak,
            quantize_seconds=self._quantize_seconds(form, n),
        )

    def time(self, form: PanelFormat, n: int, seconds: float) -> Timing:
        """Product and read in turn, for about `seconds`, the first pair left out."""
        values = np.random.default_rng(1).standard_normal((n, COLUMNS)).astype(np.float32)
        buffer = form.activations(COLUMNS, n)
        self._times([quantize_row(values.ctypes.data, values.strides[0], n, buffer)])
        out = np.empty((n, ROWS), np.float32)
        num_bytes = form.panel_bytes(ROWS, COLUMNS)
        places = max(1, self._weights.nbytes // num_bytes)

        def pair(run: int) -> list[Row]:
            first, other = (
                self._weights.ctypes.data + place % places * num_bytes for place in (run, run + places // 2)
            )
            product = matmul_row(form, first, ROWS, COLUMNS, buffer, out.ctypes.data, out.strides[0], n)
            return [product, self._read_row(form.isa, other, num_bytes)]

        once = float(self._times([*pair(0), *pair(1)])[2:].sum())
        runs = min(_MAX_RUNS, max(_MIN_RUNS, round(seconds / max(once, 1e-6))))
        times = self._times([row for run in range(2, 2 + runs) for row in pair(run)])
        products, reads = times[::2], times[1::2]
        return Timing(
            _typical(products),
            _typical(reads),
            statistics.median((reads / products).tolist()),
        )

    def peak(self, isa: ISA, kind: ActivationKind) -> float:
        """Multiplications a second of a loop without memory: float32 fused ones for float activations, else bytes."""
        is_float = kind is ActivationKind.FLOAT32
        name = "measure_fma" if is_float else "measure_dot"
        address = kernel_address(name, isa, _trace_fma if is_float else _trace_dot, thorough=False)
        row = Row(name, address, _PEAK_ITEMS * self.threads, (self._sink.ctypes.data,), keep=(self._sink,))
        seconds = float(self._times([row] * _MIN_RUNS).min())
        products = isa.lanes if is_float else 4 * isa.lanes
        return _PEAK_ITEMS * self.threads * _PEAK_TURNS * _PEAK_CHAINS * products / seconds

    def _quantize_seconds(self, form: PanelFormat, n: int) -> float:
        values = np.ones((n, COLUMNS), np.float32)
        row = quantize_row(values.ctypes.data, values.strides[0], n, form.activations(COLUMNS, n))
        return float(np.median(self._times([row] * _MIN_RUNS)))

    def _read_row(self, isa: ISA, address: int, num_bytes: int) -> Row:
        function = kernel_address("measure_read", isa, _trace_read)
        return Row("read", function, num_bytes // _READ_BYTES, (address, self._sink.ctypes.data))

    def _times(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        """Seconds of each row of a program that is run once."""
        program = Program(rows)
        times = np.zeros(len(rows) + 1, np.int64)
        self._pool.run(program, times)
        return np.maximum(np.diff(times), 1) * 1e-9


def _typical(seconds: NDArray[np.float64]) -> float:
    """The median; the mean where the thread that reads the clock was kept off its core.

    Then it finds rows done by the others, which seem to take no time, and one that seems to have taken all of it.
    """
    median, mean = statistics.median(seconds.tolist()), float(seconds.mean())
    return median if median >= mean / 2 else mean


def _trace_read(kernel: Kernel) -> None:
    """Arguments: 0 address, 1 where a number goes. Work items: runs of 4096 bytes."""
    size, line = kernel.isa.vector_bytes, 64
    parts = [kernel.variable(kernel.constant(kernel.ints, 0)) for _ in range(_READ_CHAINS)]
    with kernel.loop(kernel.begin * _READ_BYTES, kernel.end * _READ_BYTES, _READ_CHAINS * max(size, line)) as place:
        for index, part in enumerate(parts):
            address = kernel.arg(0) + place + index * max(size, line)
            for offset in range(0, max(size, line), line):
                kernel.prefetch(address, offset + 6144)
            for offset in range(0, max(size, line), size):
                part.set(part.get() ^ kernel.load(kernel.ints, address + offset))
    total = parts[0].get() ^ parts[1].get() ^ parts[2].get() ^ parts[3].get()
    kernel.store(kernel.sum_lanes(total), kernel.arg(1))


def _trace_dot(kernel: Kernel) -> None:
    """Arguments: 0 where a number goes. Work items: runs of turns, one dot product a chain each."""
    sums = [kernel.variable(kernel.constant(kernel.ints, 0)) for _ in range(_PEAK_CHAINS)]
    values = kernel.load(kernel.bytes, kernel.arg(0))
    with kernel.loop(0, (kernel.end - kernel.begin) * _PEAK_TURNS):
        for total in sums:
            total.set(kernel.dot(total.get(), values, values))
    result = sums[0].get()
    for total in sums[1:]:
        result = result + total.get()
    kernel.store(kernel.sum_lanes(result), kernel.arg(0))


def _trace_fma(kernel: Kernel) -> None:
    """As `_trace_dot`, with float32."""
    sums = [kernel.variable(kernel.constant(kernel.floats, 0.0)) for _ in range(_PEAK_CHAINS)]
    value = kernel.load_splat(F32, kernel.arg(0))
    with kernel.loop(0, (kernel.end - kernel.begin) * _PEAK_TURNS):
        for total in sums:
            total.set(kernel.fma(total.get(), value, value))
    result = sums[0].get()
    for total in sums[1:]:
        result = result + total.get()
    kernel.store(kernel.sum_lanes(result), kernel.arg(0))
