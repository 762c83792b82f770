"""What the system tells of this machine beside its speed: kinds of cores, NUMA nodes, power.

Read from sysfs and psutil; None or empty where the system does not tell. Knows nothing about models or rates.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil


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
