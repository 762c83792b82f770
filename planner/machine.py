"""A machine as the planner sees it: what computes, what holds bytes, and how fast bytes move between them.

Made from a measured profile, or read from a JSON description of a machine that is elsewhere. A value; knows nothing
about models or plans. Rates are bytes or operations a second, sizes bytes, times seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cpu_kernels.bandwidth import RatePoint


@dataclass(frozen=True, slots=True)
class KernelPoint:
    """Products of one quant type's matrices with `columns` tokens on `threads` threads."""

    threads: int
    columns: int
    bytes_per_s: float  # of panels, read from RAM
    macs_per_s: float


@dataclass(frozen=True, slots=True)
class AttentionPoint:
    """Attention over keys and values of one type on `threads` threads."""

    threads: int
    read_bytes_per_s: float  # that one token goes through, from RAM
    macs_per_s: float  # of a prompt's tokens: multiplications with keys and with values


@dataclass(frozen=True, slots=True)
class Cpu:
    """Cores and RAM bandwidth; `kernels` by quant type name, `attention` by type of the KV cache."""

    name: str
    threads: int
    read: tuple[RatePoint, ...]  # by threads, rising
    flops_per_s: float  # float32, all threads
    operation_s: float  # one operation of a program beside its work
    kernels: Mapping[str, tuple[KernelPoint, ...]] = field(default_factory=dict)
    attention: Mapping[str, tuple[AttentionPoint, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and its link; the first rate of a pair is towards the GPU."""

    name: str
    memory_bytes: int  # that may be used
    read_bytes_per_s: float
    flops_per_s: float  # of matrix products in float16
    launch_s: float
    link_to_bytes_per_s: float
    link_from_bytes_per_s: float
    handover_s: float  # latency when work changes between CPU and GPU


@dataclass(frozen=True, slots=True)
class FlashPoint:
    """Reads of `read_bytes` each, `depth` at a time."""

    read_bytes: int
    depth: int
    direct: bool
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class SpillRates:
    """Checked reads of chunks of keys and values from a drive."""

    bytes_per_s: float  # beside nothing
    beside_bytes_per_s: float  # while all threads compute
    computed_share: float  # of what those compute without reads beside them
    parts_bytes_per_s: float  # of pairs of parts of 8 KiB, beside nothing


@dataclass(frozen=True, slots=True)
class Flash:
    """The drive a model lies on."""

    name: str
    points: tuple[FlashPoint, ...]
    write_bytes_per_s: float
    free_bytes: int

    def best(self) -> FlashPoint:
        """The fastest way to read."""
        return max(self.points, key=lambda point: point.bytes_per_s)

    def rate(self, read_bytes: int) -> float:
        """The best rate of reads of at most `read_bytes`; of the smallest measured where all are larger."""
        smaller = [point for point in self.points if point.read_bytes <= read_bytes]
        least = min(point.read_bytes for point in self.points)
        usable = smaller or [point for point in self.points if point.read_bytes == least]
        return max(point.bytes_per_s for point in usable)


@dataclass(frozen=True, slots=True)
class Machine:
    """All of it. `source` says where the figures come from: measured here, or stated and by whom."""

    name: str
    source: str
    cpu: Cpu
    ram_bytes: int  # that may be used
    gpu: Gpu | None = None
    flash: Flash | None = None
