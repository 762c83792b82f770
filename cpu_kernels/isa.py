"""The instruction sets kernels are compiled for, and the choice of one of them at start.

Knows nothing about kernels: an `ISA` is plain data (vector width, which dot product and table lookup it has) that
`simd` turns into instructions. The choice is made from the features LLVM reports for this CPU, before anything is
compiled, because an instruction that the CPU lacks ends the process. `STRATA_ISA` names a lower rung to use instead.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cache

import llvmlite.binding as llvm


class Dot(Enum):
    """How four products of bytes are added to an int32."""

    VPDPBUSD = auto()  # unsigned x signed, every byte value exact
    PMADDUBSW = auto()  # unsigned x signed through saturating int16 sums: exact for unsigned bytes up to 127
    SDOT = auto()  # signed x signed
    PORTABLE = auto()  # plain multiplications


@dataclass(frozen=True, slots=True)
class ISA:
    """One rung of the ladder. `lanes` int32 fill a vector; a row group of a panel has as many rows."""

    name: str
    lanes: int
    dot: Dot
    tile_columns: int  # activation columns that one pass over a row group serves; bounded by the registers
    needs: frozenset[str] = frozenset()  # features, by LLVM's names
    cpu: str = ""  # "": the host's own name and features
    features: str = ""
    triple: str = ""  # "": the host's
    has_fma: bool = True
    has_half: bool = True  # converts float16 in hardware

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        return 4 * self.lanes

    @property
    def unsigned_bytes(self) -> bool:
        """Whether the dot product takes unsigned weights up to 255; if not, signed weights are taken as they are."""
        return self.dot is Dot.VPDPBUSD

    def for_floats(self) -> "ISA":
        """What float products use: where vectors are 64 bytes wide, two of them as one, and half the columns.

        Then each activation that is loaded serves two products: F16 at 64 columns went from 98 to 109 Gmac/s (Zen 5).
        Integer products gained nothing.
        """
        return replace(self, lanes=32, tile_columns=4) if self.lanes == 16 else self

    @property
    def has_wide_lookup(self) -> bool:
        """Whether one instruction looks bytes up in 64 (AVX512 VBMI), on this machine."""
        return "avx512bw" in self.needs and "avx512vbmi" in host_features()

    def for_tables(self) -> "ISA":
        """What table kernels use: rows of several vectors as one, and fewer columns, which halves the table's loads.

        Where lookups reach only 16 bytes a vector has a byte of each row, so that there are four times as many rows.
        """
        return replace(self, lanes=32 if self.has_wide_lookup else self.vector_bytes, tile_columns=4)

    @property
    def is_arm(self) -> bool:
        """Whether instructions are AArch64's."""
        return self.triple.startswith("aarch64") or (not self.triple and platform.machine() in ("aarch64", "arm64"))


_V3 = frozenset({"avx2", "fma", "f16c", "bmi", "bmi2"})
_LADDER = (
    ISA(
        "avx512vnni",
        lanes=16,
        dot=Dot.VPDPBUSD,
        tile_columns=8,
        needs=_V3 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"},
    ),
    ISA(
        "avxvnni",
        lanes=8,
        dot=Dot.VPDPBUSD,
        tile_columns=4,
        needs=_V3 | {"avxvnni"},
        cpu="x86-64-v3",
        features="+avxvnni",
    ),
    ISA("avx2", lanes=8, dot=Dot.PMADDUBSW, tile_columns=4, needs=_V3, cpu="x86-64-v3"),
    ISA("neon", lanes=4, dot=Dot.SDOT, tile_columns=8, needs=frozenset({"neon", "dotprod"})),
    ISA(
        "generic",
        lanes=4,
        dot=Dot.PORTABLE,
        tile_columns=4,
        cpu="generic" if platform.machine() in ("aarch64", "arm64") else "x86-64",
        has_fma=False,
        has_half=False,
    ),
)
BY_NAME: Mapping[str, ISA] = {isa.name: isa for isa in _LADDER}
# What `neon` compiles to on a machine that is not an ARM one: for looking at its instructions, never for running.
NEON_CROSS = ISA("neon", lanes=4, dot=Dot.SDOT, tile_columns=8, cpu="cortex-a76", triple="aarch64-unknown-linux-gnu")


@cache
def host_features() -> frozenset[str]:
    """The features of this CPU that the operating system lets programs use, by LLVM's names."""
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def runnable(isa: ISA) -> bool:
    """Whether this machine can execute it."""
    return not isa.triple and isa.needs <= host_features()


def runnable_isas() -> tuple[ISA, ...]:
    """Every rung this machine can execute, the best first."""
    return tuple(isa for isa in _LADDER if runnable(isa))


def choose(name: str | None) -> ISA:
    """The rung called `name`, or the best one for None; ValueError if this machine cannot execute it."""
    if name is None:
        return runnable_isas()[0]
    if name not in BY_NAME or not runnable(BY_NAME[name]):
        known = ", ".join(isa.name for isa in runnable_isas())
        raise ValueError(f"STRATA_ISA={name!r} does not run on this machine; it can be one of {known}")
    return BY_NAME[name]


@cache
def current() -> ISA:
    """The rung in use, chosen once: the best, or the one `STRATA_ISA` names (ValueError if it cannot run here)."""
    return choose(os.environ.get("STRATA_ISA") or None)


def is_forced() -> bool:
    """Whether `STRATA_ISA` names the rung in use: then kernels are the usual ones, whatever was measured."""
    return bool(os.environ.get("STRATA_ISA"))
