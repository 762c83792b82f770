"""What the system tells of this machine beside its speed: the processor, kinds of cores, NUMA nodes, power.

Read from procfs, sysfs and psutil; None or empty where the system does not tell. Knows nothing about models or rates.
"""

import logging
import os
import platform
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil

from planner.budget import cgroup_cpu_quota

log = logging.getLogger("strata.planner.host")


@dataclass(frozen=True, slots=True)
class Host:
    """`performance_cores` and `efficiency_cores` are logical CPUs; the latter 0 where all are alike."""

    performance_cores: int
    efficiency_cores: int
    numa_nodes: int
    on_battery: bool | None
    power_mode: str | None


def read_host(root: Path = Path("/")) -> Host:
    """The facts as they are now; `root` stands for "/" in tests."""
    strengths = _core_strengths(root)
    strongest = max(strengths, default=0)
    strong = sum(strength >= 0.9 * strongest for strength in strengths)
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return Host(
        performance_cores=strong,
        efficiency_cores=len(strengths) - strong,
        numa_nodes=max(len(list((root / "sys/devices/system/node").glob("node[0-9]*"))), 1),
        on_battery=None if battery is None else not battery.power_plugged,
        power_mode=_text(root / "sys/firmware/acpi/platform_profile")
        or _text(root / "sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference"),
    )


def available_threads(root: Path = Path("/")) -> int:
    """Threads worth starting: the physical cores this process may use, within its control group's CPU time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    quota = cgroup_cpu_quota(root)
    return max(1, min(allowed, physical, ceil(quota) if quota else allowed))


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name as the system tells it."""
    try:
        for line in (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError as error:
        log.debug("no processor name from the kernel: %s", error)
    return platform.processor() or platform.machine()


def _core_strengths(root: Path) -> list[int]:
    """Relative capacity of every CPU, else its highest clock, else 1 for each."""
    folders = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        texts = [_text(folder / name) for folder in folders]
        values = [int(text) for text in texts if text and text.isdigit()]
        if folders and len(values) == len(folders):
            return values
    return [1] * (len(folders) or psutil.cpu_count() or 1)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
