"""What this machine measured: rates of CPU, GPU and drives; and what runs have taught (see `profile_learned`).

Kept as JSON under the user's cache folder and measured once (under 2 s, without torch); a file of another machine,
other software or another version, or one that cannot be read, is measured again and logged. Knows nothing about
plans.

Invariant: a profile in use describes the machine it is used on, with the software that is installed.
"""

import logging
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import pairwise
from math import log as ln
from math import log2
from pathlib import Path

import numpy as np
import psutil

from cpu_kernels import bandwidth
from cpu_kernels.bandwidth import RatePoint
from cpu_kernels.quant_types import QuantType
from cpu_kernels.reference.dequantize import dequantize
from cpu_kernels.tuning import Tuning
from gpu_kernels.bandwidth import GpuRates, measure_rates
from gpu_kernels.capabilities import GpuCapabilities
from offload.flash_probe import ALL_POINTS, DriveFigures, Points, filesystem_key, probe
from planner import document, profile_kernels
from planner.apart import FAILURES, measured_apart
from planner.folders import cache_folder
from planner.host import available_threads, cpu_name
from planner.machine import AttentionPoint, KernelPoint, SpillRates
from planner.planned_draft import LearnedAcceptance
from planner.prediction import Residual
from planner.profile_kernels import KernelPoints

log = logging.getLogger("strata.planner.profile")

FORMAT_VERSION = 6
WORKING_SETS_BYTES = (4 << 20, 16 << 20, 48 << 20)  # and the whole of the measuring buffer
_MEASURING_LIMIT_S = 60
_DEQUANTIZE_BYTES = 1 << 20
_SAMPLE_BYTE = 0x35  # in every format a scale and weights that are ordinary numbers
_saved: dict[Path, "Profile"] = {}  # by this process, the last of each file


@dataclass(frozen=True, slots=True)
class Profile:
    """One machine's rates, as rising curves: `read` by threads, `matvec` (all threads, or one) by working set."""

    version: int
    cpu_name: str
    software: str
    physical_cores: int
    threads: int  # that this process may run at once
    read: tuple[RatePoint, ...]
    matvec: tuple[RatePoint, ...]
    matvec_single: tuple[RatePoint, ...]
    matmul_flops_per_s: float
    op_overhead_s: float
    dequantize_bytes_per_s: Mapping[str, float] = field(default_factory=dict)  # quantised bytes, by quant type
    kernels: Mapping[str, tuple[KernelPoint, ...]] = field(default_factory=dict)  # by quant type
    tuning: Tuning | None = None  # which kernels those are; None: the usual ones
    attention: Mapping[str, tuple[AttentionPoint, ...]] = field(default_factory=dict)  # by type of the KV cache
    drives: Mapping[str, DriveFigures] = field(default_factory=dict)  # by file system
    spills: Mapping[str, SpillRates] = field(default_factory=dict)  # by file system
    gpu: GpuRates | None = None
    residuals: Mapping[str, Residual] = field(default_factory=dict)
    hits: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)  # by model: (slots, hit rate)
    acceptances: Mapping[str, LearnedAcceptance] = field(default_factory=dict)  # by target and draft

    @property
    def described(self) -> tuple[int, str, str, int]:
        """Version of the format, CPU, software and threads: rates hold where these are the same."""
        return self.version, self.cpu_name, self.software, self.threads

    @property
    def kernel_points(self) -> KernelPoints:
        """What is known of the kernels."""
        return KernelPoints(self.kernels, self.tuning)

    @property
    def read_bytes_per_s(self) -> float:
        """RAM bandwidth with all threads."""
        return self.read_rate(self.threads)

    def read_rate(self, threads: int) -> float:
        """RAM bandwidth with `threads` threads, bytes a second."""
        return _interpolate(self.read, threads)

    def matvec_rate(self, working_set_bytes: float, threads: int) -> float:
        """Bytes of float32 matrices a second in products with one vector; between one and all threads in proportion."""
        single, every = (_interpolate(curve, working_set_bytes) for curve in (self.matvec_single, self.matvec))
        share = (threads - 1) / (self.threads - 1) if self.threads > 1 else 0.0
        return single + min(share, 1.0) * (every - single)

    def residual(self, keys: Iterable[str]) -> Residual:
        """The correction under the first of `keys` that has one."""
        return next((self.residuals[key] for key in keys if key in self.residuals), Residual(1.0, 0))


def load_or_measure(path: Path | None = None) -> Profile:
    """The stored profile of this machine, measured and stored where there is none that fits."""
    profile = stored(path)
    if profile is None:
        profile = measure_apart()
        save(profile, path)
    return profile


def measure_apart() -> Profile:
    """`measure` in a process of its own, so that its memory does not count as this one's."""
    try:
        return measured_apart(Profile, __name__, limit_s=_MEASURING_LIMIT_S)
    except FAILURES as error:
        log.warning("measuring in a process of its own failed (%s): measuring in this one", error)
        return measure()


def measure() -> Profile:
    """Measure this machine now: about a second; takes no more than a quarter of the free RAM, 128 MiB as a rule."""
    threads = available_threads()
    buffer = bandwidth.make_buffer(min(bandwidth.buffer_bytes(), psutil.virtual_memory().available // 4))
    counts = sorted({1, threads} | {1 << power for power in range(1, int(log2(threads)) + 1)})
    sizes = sorted({*(size for size in WORKING_SETS_BYTES if size < buffer.nbytes), buffer.nbytes})
    return Profile(
        version=FORMAT_VERSION,
        cpu_name=cpu_name(),
        software=software(),
        physical_cores=psutil.cpu_count(logical=False) or threads,
        threads=threads,
        read=tuple(RatePoint(count, bandwidth.read_rate(buffer, count)) for count in counts),
        matvec=tuple(RatePoint(size, bandwidth.matvec_rate(buffer, size, threads)) for size in sizes),
        matvec_single=tuple(RatePoint(size, bandwidth.matvec_rate(buffer, size, 1)) for size in sizes),
        matmul_flops_per_s=bandwidth.matmul_flops(threads),
        op_overhead_s=bandwidth.small_operation_seconds(),
    )


def with_dequantize_rates(profile: Profile, quant_types: Iterable[QuantType], path: Path | None = None) -> Profile:
    """`profile` with the reference dequantizer's rate for each of `quant_types`; new ones are measured and stored."""
    kinds = {kind.name: kind for kind in quant_types if kind.is_known}

    def measured(known: Profile) -> Profile:
        rates = dict(known.dequantize_bytes_per_s)
        for name in kinds.keys() - rates.keys():
            rates[name] = _dequantize_rate(kinds[name])
        return replace(known, dequantize_bytes_per_s=rates)

    return ensured(profile, lambda known: kinds.keys() <= known.dequantize_bytes_per_s.keys(), measured, path)


def with_kernel_rates(profile: Profile, quant_types: Iterable[QuantType], path: Path | None = None) -> Profile:
    """`profile` with the kernels chosen for each of `quant_types` and their rates; new ones are measured and stored."""
    names = {kind.name for kind in quant_types if kind.is_known}

    def measured(known: Profile) -> Profile:
        missing = known.kernel_points.missing(names)
        found = known.kernel_points.updated(profile_kernels.measure_apart(missing, known.threads))
        return replace(known, kernels=found.types, tuning=found.tuning)

    return ensured(profile, lambda known: not known.kernel_points.missing(names), measured, path)


def with_drive(profile: Profile, place: Path, path: Path | None = None, *, points: Points = ALL_POINTS) -> Profile:
    """`profile` with these points of the drive that `place` lies on; OSError.

    Measured, a quarter of a second a point and mode, and stored, unless as many are known.
    """
    key = filesystem_key(place)

    def is_known(known: Profile) -> bool:
        return key in known.drives and len({read.read_bytes for read in known.drives[key].reads}) >= len(dict(points))

    def measured(known: Profile) -> Profile:
        return replace(known, drives={**known.drives, key: probe(place, points=points)})

    return ensured(profile, is_known, measured, path)


def with_gpu_rates(profile: Profile, gpu: GpuCapabilities, path: Path | None = None) -> Profile:
    """`profile` with the rates of `gpu`, measured and stored where they are not known yet."""

    def measured(known: Profile) -> Profile:
        return replace(known, gpu=measure_rates(gpu.name, gpu.torch_device))

    return ensured(profile, lambda known: known.gpu is not None and known.gpu.name == gpu.name, measured, path)


def ensured(
    profile: Profile,
    is_known: Callable[[Profile], bool],
    measured: Callable[[Profile], Profile],
    path: Path | None = None,
) -> Profile:
    """`profile` with what `is_known` asks for: as this process has saved it since `profile` was read, or `measured`.

    What is measured is stored, beside all that was saved before: callers may go on with an old profile.
    """
    if is_known(profile):
        return profile
    profile = _with_newer(profile, _saved.get(_path(path)))
    if is_known(profile):
        return profile
    found = measured(profile)
    if found == profile:  # it could not be measured
        return profile
    save(found, path)
    return found


def _with_newer(profile: Profile, newer: Profile | None) -> Profile:
    """`profile` with what a later one of the same machine knows beside it."""
    if newer is None or newer.described != profile.described:
        return profile
    points = newer.kernel_points.updated(profile.kernel_points)
    return replace(
        profile,
        dequantize_bytes_per_s={**newer.dequantize_bytes_per_s, **profile.dequantize_bytes_per_s},
        kernels=points.types,
        tuning=points.tuning,
        attention={**newer.attention, **profile.attention},
        drives={**newer.drives, **profile.drives},
        spills={**newer.spills, **profile.spills},
        gpu=profile.gpu or newer.gpu,
        residuals={**profile.residuals, **newer.residuals},
        hits={**profile.hits, **newer.hits},
        acceptances={**profile.acceptances, **newer.acceptances},
    )


def save(profile: Profile, path: Path | None = None) -> None:
    """Store `profile` as a whole or not at all; a folder that cannot be written is logged, not an error."""
    path = _path(path)
    _saved[path] = profile
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(document.dumps(profile))
                file.close()
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        log.info("the profile is not kept: cannot write %s (%s)", path, error.strerror)


def stored(path: Path | None = None) -> Profile | None:
    """The profile kept at `path` if it is this machine's and this software's."""
    path = _path(path)
    try:
        profile = document.loads(Profile, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        log.info("no profile of this machine yet: measuring it")
        return None
    except (OSError, ValueError) as error:
        log.info("the profile %s cannot be used (%s): measuring again", path, error)
        return None
    if profile.described != (FORMAT_VERSION, cpu_name(), software(), available_threads()):
        log.info("the profile %s is of another machine or other software: measuring again", path)
        return None
    curves = (profile.read, profile.matvec, profile.matvec_single)
    if not all(curves) or any(point.at <= 0 or point.bytes_per_s <= 0 for curve in curves for point in curve):
        log.info("the profile %s holds rates that cannot be: measuring again", path)
        return None
    return profile


def software() -> str:
    """Versions of what decides the rates."""
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("strata", "numpy", "torch"))
    return f"{versions} python {platform.python_version()} {sys.platform}"


def _dequantize_rate(kind: QuantType) -> float:
    """Quantised bytes a second."""
    columns = kind.block_size * max(1, 4096 // kind.block_size)
    data = np.full((_DEQUANTIZE_BYTES // kind.row_bytes(columns), kind.row_bytes(columns)), _SAMPLE_BYTE, np.uint8)
    return bandwidth.conversion_rate(lambda rows: dequantize(rows, kind), data)


def _path(path: Path | None) -> Path:
    return path or cache_folder() / "profile.json"


def _interpolate(curve: tuple[RatePoint, ...], at: float) -> float:
    """The rate at `at`: between two points along the logarithm of the size, beyond the ends as at the ends."""
    for low, high in pairwise(curve):
        if at < high.at:
            share = (ln(max(at, low.at)) - ln(low.at)) / (ln(high.at) - ln(low.at))
            return low.bytes_per_s + share * (high.bytes_per_s - low.bytes_per_s)
    return curve[-1].bytes_per_s
